// Adam-mini: see refopt/rules/adam_mini.py. States: m, and v, one entry a block; ELEMENTWISE keeps v for each weight.
template <bool ELEMENTWISE> struct adam_mini {
    static constexpr int KEPT = ELEMENTWISE ? 2 : 1, SUMS = 1, PAIRS = 0, BATCH = 4, UPDATE_BATCH = 1;
    static constexpr int UPDATE_READS = ELEMENTWISE ? 15 : 7, UPDATE_USES = 0;
    struct Scalars { float gs, beta1, omb1, beta2, omb2, ibc1, ir2, eps, lr, decay; };
    struct Wide { double unused; };
    struct Hypers { double lr, beta1, beta2, eps, wd; };
    HD static void scalars(uint64_t t, bool, double gs, const Hypers& h, Scalars& s, Wide& w) {
        s.gs = rounded(gs), s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2));
        s.ibc1 = rounded(div64(1.0, sub64(1.0, ipow(h.beta1, t))));
        s.ir2 = rounded(div64(1.0, sqrt64(sub64(1.0, ipow(h.beta2, t))))), s.eps = rounded(h.eps);
        s.lr = rounded(h.lr), s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd))), w.unused = 0.0;
    }
    static constexpr int sums_read(int) { return 2; }
    static constexpr int sums_use(int) { return 0; }
    template <class A> HD static float rate(A& a, float& v, float q, const Scalars& s) {
        v = add(mul(s.beta2, v), mul(s.omb2, q));
        return mul(s.ibc1, a.inverse_root(v, s.ir2, s.eps));
    }
    template <int PASS, class A, class E> HD static void sums(A&, const E& e, const Scalars&, float (&out)[SUMS]) { out[0] = e.g; }
    template <int PASS> HD static void finish(const double (&r)[SUMS], double n, const Scalars& s, const Wide&, float* v, float* k) {
        Ieee ieee;
        k[0] = rate(ieee, *v, rounded(div64(r[0], n)), s);
    }
    template <class A, class E> HD static void update(A& a, E& e, const Scalars& s) {
        float k = ELEMENTWISE ? rate(a, e.x[KEPT - 1], mul(e.g, e.g), s) : e.k[0], &m = e.x[0];
        m = add(mul(s.beta1, m), mul(s.omb1, e.g));
        e.p = sub(mul(e.p, s.decay), mul(s.lr, mul(m, k)));
    }
};
