// AdEMAMix: see refopt/rules/ademamix.py. States: m1 (none for beta1 = 0), m2, v.
template <bool BETA1, int DECAY_ORDER> struct ademamix {
    static constexpr int STATES = BETA1 ? 3 : 2;
    struct Scalars { float gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps, beta3, omb3, a, lr, ibc1, wd; };
    struct Hypers { double lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, wd; };
    HD static void scalars(uint64_t t, double gs, const Hypers& h, Scalars& s) {  // without the schedules of alpha and beta3
        double bc1 = sub64(1.0, ipow(h.beta1, t)), bc2 = sub64(1.0, ipow(h.beta2, t));
        s.gs = rounded(gs), s.step = rounded(div64(h.lr, bc1)), s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd)));
        s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2));
        s.ir2 = rounded(div64(1.0, sqrt64(bc2))), s.eps = rounded(h.eps);
        s.beta3 = rounded(h.beta3), s.omb3 = rounded(sub64(1.0, h.beta3)), s.a = rounded(mul64(h.alpha, bc1));
        s.lr = rounded(h.lr), s.ibc1 = rounded(div64(1.0, bc1)), s.wd = rounded(h.wd);
    }
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[STATES], const Scalars& s) {
        float &m2 = x[STATES - 2], &v = x[STATES - 1];
        if (DECAY_ORDER == BEFORE) p = mul(p, s.decay);
        if (BETA1) x[0] = add(mul(s.beta1, x[0]), mul(s.omb1, g));
        m2 = add(mul(s.beta3, m2), mul(s.omb3, g));
        v = add(mul(s.beta2, v), mul(s.omb2, mul(g, g)));
        float num = add(BETA1 ? x[0] : g, mul(s.a, m2)), r = over_root<OUTSIDE>(a, v, s.ir2, s.eps);
        if (DECAY_ORDER == ADDITIVE) p = sub(p, mul(s.lr, add(mul(mul(num, s.ibc1), r), mul(s.wd, p))));
        else p = sub(p, mul(s.step, mul(num, r)));
        if (DECAY_ORDER == AFTER) p = mul(p, s.decay);
    }
};
