// AdamW: see refopt/rules/adamw.py. States: m, v.
struct adamw {
    static constexpr int STATES = 2;
    struct Scalars { float gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps; };
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[2], const Scalars& s) {
        float &m = x[0], &v = x[1];
        p = mul(p, s.decay);
        m = add(mul(s.beta1, m), mul(s.omb1, g));
        v = add(mul(s.beta2, v), mul(s.omb2, mul(g, g)));
        float r = a.inverse_root(v, s.ir2, s.eps);
        p = sub(p, mul(s.step, mul(m, r)));
    }
};
