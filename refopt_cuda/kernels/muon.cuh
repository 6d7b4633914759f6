// Muon's arithmetic outside of its products, one element: the momentum, what is made orthogonal, and the step.
#pragma once

struct muon {
    struct Scalars {
        float mu, omb, decay, step;
    };
    static HD float momentum(float b, float g, const Scalars& s) { return add(mul(s.mu, b), mul(s.omb, g)); }
    static HD float ahead(float b, float g, const Scalars& s) { return add(mul(s.omb, g), mul(s.mu, b)); }
    static HD float weight(float p, float x, const Scalars& s) { return sub(mul(p, s.decay), mul(s.step, x)); }
};
