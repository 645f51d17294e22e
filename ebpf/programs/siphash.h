/* SipHash-2-4 over 8-byte words (Aumasson, Bernstein 2012); the message is 8 * words bytes long. */
#define ROTATE(x, bits) (((x) << (bits)) | ((x) >> (64 - (bits))))
#define SIPROUND                                                                                   \
    do {                                                                                           \
        v0 += v1;                                                                                  \
        v1 = ROTATE(v1, 13);                                                                       \
        v1 ^= v0;                                                                                  \
        v0 = ROTATE(v0, 32);                                                                       \
        v2 += v3;                                                                                  \
        v3 = ROTATE(v3, 16);                                                                       \
        v3 ^= v2;                                                                                  \
        v0 += v3;                                                                                  \
        v3 = ROTATE(v3, 21);                                                                       \
        v3 ^= v0;                                                                                  \
        v2 += v1;                                                                                  \
        v1 = ROTATE(v1, 17);                                                                       \
        v1 ^= v2;                                                                                  \
        v2 = ROTATE(v2, 32);                                                                       \
    } while (0)

static __always_inline u64 siphash(u64 key0, u64 key1, const u64 *word, int words) {
    u64 v0 = key0 ^ 0x736f6d6570736575ULL, v1 = key1 ^ 0x646f72616e646f6dULL;
    u64 v2 = key0 ^ 0x6c7967656e657261ULL, v3 = key1 ^ 0x7465646279746573ULL;
#pragma unroll
    for (int i = 0; i < words; i++) {
        v3 ^= word[i];
        SIPROUND;
        SIPROUND;
        v0 ^= word[i];
    }
    u64 last = (u64)(8 * words) << 56;
    v3 ^= last;
    SIPROUND;
    SIPROUND;
    v0 ^= last;
    v2 ^= 0xff;
    SIPROUND;
    SIPROUND;
    SIPROUND;
    SIPROUND;
    return v0 ^ v1 ^ v2 ^ v3;
}
