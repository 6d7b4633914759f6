// SGD with momentum: see refopt/rules/sgd.py. State: buf.
struct sgd {
    static constexpr int STATES = 1;
    struct Scalars { float gs, lr, wd, mu, damp, coupled, first, nesterov; };
    template <class A> HD static void update(A&, float& p, float g, float (&x)[1], const Scalars& s) {
        float& b = x[0];
        if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        b = s.first != 0.0f ? g : add(mul(s.mu, b), mul(s.damp, g));
        float d = s.nesterov != 0.0f ? add(g, mul(s.mu, b)) : b;
        p = sub(p, mul(s.lr, d));
    }
};

// Without momentum nothing is kept.
struct sgd_plain {
    static constexpr int STATES = 0;
    using Scalars = sgd::Scalars;
    template <class A> HD static void update(A&, float& p, float g, float (&)[1], const Scalars& s) {
        if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        p = sub(p, mul(s.lr, g));
    }
};
