// Adam: see refopt/rules/adam.py. States: m, v, and w under amsgrad.
template <bool AMSGRAD, int EPS_AT, int DECAY> struct adam {
    static constexpr int STATES = AMSGRAD ? 3 : 2;
    struct Scalars { float gs, step, wd, beta1, omb1, beta2, omb2, ir2, eps, coupled, keep; };
    struct Hypers { double lr, beta1, beta2, eps, wd, bias_correction; };
    HD static void scalars(uint64_t t, double gs, const Hypers& h, Scalars& s) {
        double bc1 = h.bias_correction != 0.0 ? sub64(1.0, ipow(h.beta1, t)) : 1.0;
        double bc2 = h.bias_correction != 0.0 ? sub64(1.0, ipow(h.beta2, t)) : 1.0;
        s.gs = rounded(gs), s.step = rounded(div64(h.lr, bc1)), s.wd = rounded(h.wd);
        s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2));
        s.ir2 = rounded(div64(1.0, sqrt64(bc2))), s.eps = rounded(h.eps);
        s.coupled = nonzero(s.wd), s.keep = rounded(sub64(1.0, mul64(h.lr, h.wd)));
    }
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
