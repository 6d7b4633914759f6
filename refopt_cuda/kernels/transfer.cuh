// Quantize and dequantize as rules with one state: what is in the gradient's place is stored, or what is stored comes back in
// the weights' place.
struct store_only {
    static constexpr int STATES = 1;
    struct Scalars { float gs; };
    template <class A> HD static void update(A&, float&, float g, float (&x)[1], const Scalars&) { x[0] = g; }
};
struct load_only {
    static constexpr int STATES = 1;
    struct Scalars { float gs; };
    template <class A> HD static void update(A&, float& p, float, float (&x)[1], const Scalars&) { p = x[0]; }
};
