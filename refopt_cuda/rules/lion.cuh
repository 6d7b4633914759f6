// Lion: see refopt/rules/lion.py. State: m.
template <int DECAY_ORDER> struct lion {
    static constexpr int STATES = 1;
    struct Scalars { float gs, lr, decay, beta1, omb1, beta2, omb2, wd; };
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
