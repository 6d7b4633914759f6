// Adagrad: see refopt/rules/adagrad.py. State: the sum of squares.
template <int EPS_AT> struct adagrad {
    static constexpr int STATES = 1;
    struct Scalars { float gs, clr, wd, eps, coupled; };
    template <class A> HD static void update(A& a, float& p, float g, float (&x)[1], const Scalars& s) {
        float& total = x[0];
        if (s.coupled != 0.0f) g = add(g, mul(s.wd, p));
        total = add(total, mul(g, g));
        p = sub(p, mul(s.clr, mul(g, over_root<EPS_AT>(a, total, 1.0f, s.eps))));
    }
};
