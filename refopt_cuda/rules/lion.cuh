// Lion: see refopt/rules/lion.py. State: m.
struct lion {
    static constexpr int STATES = 1;
    struct Scalars { float gs, lr, decay, beta1, omb1, beta2, omb2; };
    template <class A> HD static void update(A&, float& p, float g, float (&x)[1], const Scalars& s) {
        float& m = x[0];
        p = mul(p, s.decay);
        float c = add(mul(s.beta1, m), mul(s.omb1, g));
        p = sub(p, mul(s.lr, sgn(c)));
        m = add(mul(s.beta2, m), mul(s.omb2, g));
    }
};
