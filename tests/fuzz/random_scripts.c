/* Replaces libFuzzer: takes a seed and a number of random scripts. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv)
{
    uint64_t state = argc > 1 ? strtoull(argv[1], NULL, 0) * 2 + 1 : 1;
    unsigned long count = argc > 2 ? strtoul(argv[2], NULL, 0) : 10000;
    for (unsigned long i = 0; i < count; i++) {
        uint8_t data[200];
        for (size_t n = 0; n < sizeof data; n++) {
            /* xorshift64*: the same numbers everywhere. */
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            data[n] = (uint8_t)(state * 0x2545f4914f6cdd1d >> 56);
        }
        LLVMFuzzerTestOneInput(data, i % sizeof data);
    }
    printf("%lu scripts\n", count);
    return 0;
}
