// LAMB: see refopt/rules/lamb.py. States: m, v. The direction is computed twice, first for its length.
template <int VARIANT> struct lamb {
    static constexpr int KEPT = 2, SUMS = 2, PAIRS = 0, BATCH = 1, UPDATE_BATCH = 1;
    static constexpr int UPDATE_READS = 15, UPDATE_USES = 0;
    struct Scalars { float gs, beta1, omb1, beta2, omb2, ibc1, ir2, eps, wd, decay; };
    struct Wide { double lr, low, high, longest, bare; };
    struct Hypers { double lr, beta1, beta2, eps, wd, low, high, bias_correction, variant, longest, exclude_1d; };
    HD static void scalars(uint64_t t, bool vector, double gs, const Hypers& h, Scalars& s, Wide& w) {
        const bool bare = h.exclude_1d != 0.0 && vector, apex = h.variant == 1.0;
        const double wd = bare ? 0.0 : h.wd;
        double bc1 = h.bias_correction != 0.0 ? sub64(1.0, ipow(h.beta1, t)) : 1.0;
        double bc2 = h.bias_correction != 0.0 ? sub64(1.0, ipow(h.beta2, t)) : 1.0;
        s.gs = rounded(gs), s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2));
        s.ibc1 = rounded(div64(1.0, bc1)), s.ir2 = rounded(div64(1.0, sqrt64(bc2)));
        s.eps = rounded(h.eps), s.wd = rounded(wd), s.decay = rounded(sub64(1.0, mul64(h.lr, wd)));
        w.lr = h.lr, w.low = h.low, w.high = given(h.high) ? h.high : infinity64(), w.longest = h.longest;
        w.bare = bare || (apex && wd == 0.0) ? 1.0 : 0.0;
    }
    static constexpr int sums_read(int) { return 15; }
    static constexpr int sums_use(int) { return 0; }
    template <class A, class E> HD static float direction(A& a, E& e, const Scalars& s) {
        float &m = e.x[0], &v = e.x[1];
        m = add(mul(s.beta1, m), mul(s.omb1, e.g));
        v = add(mul(s.beta2, v), mul(s.omb2, mul(e.g, e.g)));
        float u = mul(mul(m, s.ibc1), a.inverse_root(v, s.ir2, s.eps));
        return VARIANT == CLIP ? u : add(u, mul(s.wd, e.p));
    }
    template <int PASS, class A, class E> HD static void sums(A& a, E e, const Scalars& s, float (&out)[SUMS]) {
        out[0] = e.p, out[1] = direction(a, e, s);
    }
    template <int PASS> HD static void finish(const double (&r)[SUMS], double, const Scalars&, const Wide& w, float*, float* k) {
        double wn = sqrt64(r[0]), un = sqrt64(r[1]), q = 1.0;
        if (wn > 0.0 && un > 0.0 && w.bare == 0.0) {
            if (VARIANT == CLIP) q = div64(mul64(w.longest, wn), un), q = q < 1.0 ? q : 1.0;
            else q = wn < w.low ? w.low : wn, q = div64(w.high < q ? w.high : q, un);
        }
        k[0] = rounded(mul64(w.lr, q));
    }
    template <class A, class E> HD static void update(A& a, E& e, const Scalars& s) {
        float u = direction(a, e, s);
        e.p = sub(e.p, mul(e.k[0], u));
        if (VARIANT == CLIP) e.p = mul(e.p, s.decay);
    }
};
