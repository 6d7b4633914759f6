// RMSprop: see refopt/rules/rmsprop.py. States: v, a if centered, buf if there is a momentum.
template <bool CENTERED, bool MOMENTUM, int EPS_AT> struct rmsprop {
    static constexpr int STATES = 1 + CENTERED + MOMENTUM;
    struct Scalars { float gs, lr, wd, alpha, oma, eps, mu, coupled; };
    struct Hypers { double lr, alpha, eps, wd, momentum; };
    HD static void scalars(uint64_t, double gs, const Hypers& h, Scalars& s) {
        s.gs = rounded(gs), s.lr = rounded(h.lr), s.wd = rounded(h.wd);
        s.alpha = rounded(h.alpha), s.oma = rounded(sub64(1.0, h.alpha)), s.eps = rounded(h.eps);
        s.mu = rounded(h.momentum), s.coupled = nonzero(s.wd);
    }
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[STATES], const Scalars& s) {
        float &v = x[0], &mean = x[CENTERED ? 1 : 0], &buf = x[STATES - 1];
        if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        v = add(mul(s.alpha, v), mul(s.oma, mul(g, g)));
        float z = v;
        if (CENTERED) {
            mean = add(mul(s.alpha, mean), mul(s.oma, g));
            z = maximum(sub(v, mul(mean, mean)), 0.0f);
        }
        float u = mul(g, over_root<EPS_AT>(a, z, 1.0f, s.eps));
        if (MOMENTUM) u = buf = add(mul(s.mu, buf), u);
        p = sub(p, mul(s.lr, u));
    }
};
