// A judge in C++ over stdin and stdout: score k is the sum of all pixels p[i] * (((31 * k + 17 * i) % 13) - 6) / 8.
#include <cstdint>
#include <cstdio>
#include <vector>

int main() {
    uint32_t header[4];
    const uint32_t classes = 7;
    while (std::fread(header, sizeof header, 1, stdin) == 1) {
        const uint64_t count = header[0], size = uint64_t(header[1]) * header[2] * header[3];
        std::vector<float> pixels(count * size), scores(count * classes);
        if (std::fread(pixels.data(), 4, pixels.size(), stdin) != pixels.size()) return 3;
        for (uint64_t n = 0; n < count; n++)
            for (uint32_t k = 0; k < classes; k++) {
                double sum = 0;
                for (uint64_t i = 0; i < size; i++)
                    sum += pixels[n * size + i] * (double((31 * k + 17 * i) % 13) - 6) / 8;
                scores[n * classes + k] = float(sum);
            }
        const uint32_t answer[2] = {header[0], classes};
        std::fwrite(answer, sizeof answer, 1, stdout);
        std::fwrite(scores.data(), 4, scores.size(), stdout);
        std::fflush(stdout);
    }
}
