// Muon's arithmetic outside of its products, one element: the momentum, what is made orthogonal, and the step.
#pragma once

struct muon {
    struct Scalars {
        float mu, omb, decay, step, gs;
    };
    struct Hypers { double lr, momentum, wd, factor; };
    HD static void scalars(uint64_t, double gs, const Hypers& h, Scalars& s) {
        s.mu = rounded(h.momentum), s.omb = rounded(sub64(1.0, h.momentum)), s.gs = rounded(gs);
        s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd))), s.step = rounded(mul64(h.lr, h.factor));
    }
    static HD float momentum(float b, float g, const Scalars& s) { return add(mul(s.mu, b), mul(s.omb, g)); }
    static HD float ahead(float b, float g, const Scalars& s) { return add(mul(s.omb, g), mul(s.mu, b)); }
    static HD float weight(float p, float x, const Scalars& s) { return sub(mul(p, s.decay), mul(s.step, x)); }
};
