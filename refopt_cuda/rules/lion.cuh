// Lion: see refopt/rules/lion.py. State: m.
template <int DECAY_ORDER> struct lion {
    static constexpr int STATES = 1;
    struct Scalars { float gs, lr, decay, beta1, omb1, beta2, omb2, wd; };
    struct Hypers { double lr, beta1, beta2, wd; };
    HD static void scalars(uint64_t, double gs, const Hypers& h, Scalars& s) {
        s.gs = rounded(gs), s.lr = rounded(h.lr), s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd)));
        s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2)), s.wd = rounded(h.wd);
    }
    template <class A> HD static void update(A&, float& p, float g, float (&x)[1], const Scalars& s) {
        float& m = x[0];
        if (DECAY_ORDER == BEFORE) p = mul(p, s.decay);
        float u = sgn(add(mul(s.beta1, m), mul(s.omb1, g)));
        if (DECAY_ORDER == ADDITIVE) u = add(u, mul(s.wd, p));
        p = sub(p, mul(s.lr, u));
        m = add(mul(s.beta2, m), mul(s.omb2, g));
        if (DECAY_ORDER == AFTER) p = mul(p, s.decay);
    }
};
