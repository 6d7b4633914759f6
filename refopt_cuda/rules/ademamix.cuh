// AdEMAMix: see refopt/rules/ademamix.py. States: m1 (none for beta1 = 0), m2, v.
template <bool BETA1, int DECAY_ORDER> struct ademamix {
    static constexpr int STATES = BETA1 ? 3 : 2;
    struct Scalars { float gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps, beta3, omb3, a, lr, ibc1, wd; };
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
