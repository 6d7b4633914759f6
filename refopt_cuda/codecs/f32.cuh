// float32, stored as it is: see refopt/codecs/f32.py.
struct f32 {
    static constexpr int BITS = 32;
    static constexpr bool SCALED = false;
    typedef float Code;
    HD static float decode(Code c) { return c; }
    HD static Code encode(float x) { return x; }
};
