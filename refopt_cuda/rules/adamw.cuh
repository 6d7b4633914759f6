// AdamW: see refopt/rules/adamw.py. States: m, v, and w under amsgrad.
template <bool AMSGRAD, int EPS_AT, int DECAY_ORDER> struct adamw {
    static constexpr int STATES = AMSGRAD ? 3 : 2;
    struct Scalars { float gs, step, decay, beta1, omb1, beta2, omb2, ir2, eps, lr, ibc1, wd; };
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[STATES], const Scalars& s) {
        float &m = x[0], &v = x[1], &w = x[STATES - 1];  // w is v without amsgrad
        if (DECAY_ORDER == BEFORE) p = mul(p, s.decay);
        m = add(mul(s.beta1, m), mul(s.omb1, g));
        v = add(mul(s.beta2, v), mul(s.omb2, mul(g, g)));
        if (AMSGRAD) w = maximum(w, v);
        float r = over_root<EPS_AT>(a, w, s.ir2, s.eps);
        if (DECAY_ORDER == ADDITIVE) p = sub(p, mul(s.lr, add(mul(mul(m, s.ibc1), r), mul(s.wd, p))));
        else p = sub(p, mul(s.step, mul(m, r)));
        if (DECAY_ORDER == AFTER) p = mul(p, s.decay);
    }
};
