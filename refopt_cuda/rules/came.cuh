// CAME: see refopt/rules/came.py. Factors R, C and Rr, Cr; V for a vector; m.
struct came {
    static constexpr int KEPT = 2, SUMS = 1, PAIRS = 2, BATCH = 2, UPDATE_BATCH = 1;
    static constexpr int UPDATE_READS = 15, UPDATE_USES = 2;
    struct Scalars { float gs, beta1, omb1, beta2, omb2, beta3, omb3, eps1, eps2, lr, decay; };
    struct Wide { double clip; };
    struct Hypers { double lr, beta1, beta2, beta3, eps1, eps2, clip, wd; };
    HD static void scalars(uint64_t, bool, double gs, const Hypers& h, Scalars& s, Wide& w) {
        s.gs = rounded(gs), s.beta1 = rounded(h.beta1), s.omb1 = rounded(sub64(1.0, h.beta1));
        s.beta2 = rounded(h.beta2), s.omb2 = rounded(sub64(1.0, h.beta2));
        s.beta3 = rounded(h.beta3), s.omb3 = rounded(sub64(1.0, h.beta3)), s.eps1 = rounded(h.eps1), s.eps2 = rounded(h.eps2);
        s.lr = rounded(h.lr), s.decay = rounded(sub64(1.0, mul64(h.lr, h.wd))), w.clip = h.clip;
    }
    static constexpr int sums_read(int) { return 6; }
    static constexpr int sums_use(int) { return 1; }
    static constexpr int tiles_read(int pass) { return pass ? 10 : 2; }
    static constexpr int tiles_use(int pass) { return pass; }
    HD static float keep(int pass, const Scalars& s) { return pass ? s.beta3 : s.beta2; }
    HD static float gain(int pass, const Scalars& s) { return pass ? s.omb3 : s.omb2; }
    HD static double least(const Scalars&) { return 0.0; }
    template <class A, class E> HD static float direction(A& a, E& e, const Scalars& s) {  // U before it is cut
        float inverse = e.inverse[0];
        if (e.vector) {
            e.x[0] = add(mul(s.beta2, e.x[0]), mul(s.omb2, add(mul(e.g, e.g), s.eps1)));
            inverse = a.rcp(a.sqrt(e.x[0]));
        }
        return mul(inverse, e.g);
    }
    template <class A, class E> HD static float moved(A& a, E& e, const Scalars& s) {  // U; m follows it
        float u = mul(direction(a, e, s), e.k[0]);
        e.x[1] = add(mul(s.beta1, e.x[1]), mul(s.omb1, u));
        return u;
    }
    template <int PASS, class A, class E> HD static float tile(A& a, E e, const Scalars& s) {
        if (PASS == 0) return add(mul(e.g, e.g), s.eps1);
        float u = moved(a, e, s), d = sub(u, e.x[1]);
        return add(mul(d, d), s.eps2);
    }
    template <int PASS, class A, class E> HD static void sums(A& a, E e, const Scalars& s, float (&out)[SUMS]) { out[0] = direction(a, e, s); }
    template <int PASS> HD static void finish(const double (&r)[SUMS], double n, const Scalars&, const Wide& w, float*, float* k) {
        double size = widened(rounded(sqrt64(div64(r[0], n))));
        k[0] = divide(1.0f, maximum(1.0f, rounded(div64(size, w.clip))));
    }
    template <class A, class E> HD static void update(A& a, E& e, const Scalars& s) {
        moved(a, e, s);
        float step = e.vector ? e.x[1] : mul(e.inverse[1], e.x[1]);
        e.p = sub(mul(e.p, s.decay), mul(s.lr, step));
    }
};
