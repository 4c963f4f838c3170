// pushes and packets of cuda_words.cpp without Python, for ThreadSanitizer.
//
//   cuda_words_alone KERNEL CTAS MISTAKE [SEED ...]
//
// Prints a line for each seed: right, wrong, or why the launch failed.
#include "host.cpp"

#include <cstdio>

int main(int count, char** words) {
  const int CTAS = std::atoi(words[2]), T = 6;
  const bool pushes = std::string(words[1]) == "pushes";
  for (int at = 4; at < count; ++at) {
    std::vector<float> h(CTAS * 64), y(CTAS * 64), beside(2 * CTAS * 64);
    for (size_t k = 0; k < h.size(); ++k) h[k] = float(k % 3);
    std::vector<Words4> packets(4 * CTAS * 64);
    int32_t fault = 0;
    fastseq::Arguments a{};
    a.T = T, a.team = CTAS, a.save = std::atoi(words[3]), a.patience = 400, a.code = 1;
    a.h_0 = h.data(), a.y = y.data(), a.c_all = beside.data(), a.packets = packets.data();
    a.fault = &fault;
    fastseq_host_seed(std::atoi(words[at]));
    const int64_t shared = pushes ? 256 + CTAS * 512 + 16 : 0;
    const bool failed = fastseq_host_launch(words[1], CTAS, 1, 1, 64, shared, pushes ? CTAS : 1,
                                            true, &a, sizeof a);
    for (int t = 0; t < T; ++t) {
      const std::vector<float> before = h;
      for (int x = 0; x < CTAS; ++x)
        for (int k = 0; k < 64; ++k) {
          h[x * 64 + k] = float(x);
          for (int c = 0; c < CTAS; ++c) h[x * 64 + k] += float(c + 1) * before[c * 64 + 63 - k];
          h[x * 64 + k] = std::fmod(h[x * 64 + k], 64.0f);
        }
    }
    const bool right = !fault && h == y;
    std::printf("%s\n", failed ? fastseq_host_message() : right ? "right" : "wrong");
  }
}
