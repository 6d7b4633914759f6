// SGD with momentum: see refopt/rules/sgd.py. State: buf, none without momentum.
template <bool MOMENTUM, int LR_AT, int DECAY> struct sgd {
    static constexpr int STATES = MOMENTUM;
    struct Scalars { float gs, lr, wd, mu, damp, coupled, first, nesterov, keep; };
    struct Hypers { double lr, momentum, dampening, wd, nesterov; };
    HD static void scalars(uint64_t t, double gs, const Hypers& h, Scalars& s) {
        s.gs = rounded(gs), s.lr = rounded(h.lr), s.wd = rounded(h.wd), s.mu = rounded(h.momentum);
        s.damp = rounded(sub64(1.0, h.dampening)), s.coupled = nonzero(s.wd), s.first = flag(t == 1);
        s.nesterov = flag(h.nesterov != 0.0), s.keep = rounded(sub64(1.0, mul64(h.lr, h.wd)));
    }
    template <class A> HD static void update(A&, float& p, float g, float (&x)[1], const Scalars& s) {
        if (DECAY == DECOUPLED) p = mul(p, s.keep);
        else if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        if (LR_AT == INSIDE) g = mul(s.lr, g);
        float d = g;
        if (MOMENTUM) {
            float& b = x[0];
            b = s.first != 0.0f ? g : add(mul(s.mu, b), mul(s.damp, g));
            d = s.nesterov != 0.0f ? add(g, mul(s.mu, b)) : b;
        }
        p = sub(p, LR_AT == INSIDE ? d : mul(s.lr, d));
    }
};
