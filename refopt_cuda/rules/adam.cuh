// Adam: see refopt/rules/adam.py. States: m, v, and w under amsgrad.
template <bool AMSGRAD, int EPS_AT, int DECAY> struct adam {
    static constexpr int STATES = AMSGRAD ? 3 : 2;
    struct Scalars { float gs, step, wd, beta1, omb1, beta2, omb2, ir2, eps, coupled, keep; };
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[STATES], const Scalars& s) {
        float &m = x[0], &v = x[1], &w = x[STATES - 1];  // w is v without amsgrad
        if (DECAY == DECOUPLED) p = mul(p, s.keep);
        else if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        m = add(mul(s.beta1, m), mul(s.omb1, g));
        v = add(mul(s.beta2, v), mul(s.omb2, mul(g, g)));
        if (AMSGRAD) w = maximum(w, v);
        float r = over_root<EPS_AT>(a, w, s.ir2, s.eps);
        p = sub(p, mul(s.step, mul(m, r)));
    }
};
