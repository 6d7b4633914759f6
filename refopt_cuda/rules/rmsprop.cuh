// RMSprop: see refopt/rules/rmsprop.py. States: v, a if centered, buf if there is a momentum.
template <bool CENTERED, bool MOMENTUM, int EPS_AT> struct rmsprop {
    static constexpr int STATES = 1 + CENTERED + MOMENTUM;
    struct Scalars { float gs, lr, wd, alpha, oma, eps, mu, coupled; };
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
