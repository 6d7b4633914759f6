// SGD with momentum: see refopt/rules/sgd.py. State: buf, none without momentum.
template <bool MOMENTUM, int LR_AT, int DECAY> struct sgd {
    static constexpr int STATES = MOMENTUM;
    struct Scalars { float gs, lr, wd, mu, damp, coupled, first, nesterov, keep; };
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
