// Part of driver.cpp: conditional random fields. What more threads give is the same, bit for bit; what
// makes it right is for the tests in Python. With `far` some sequences have scores that are walked in
// logarithms.
template <class T>
void check_chains(int64_t steps, int64_t batch, int64_t K, int64_t n, bool far) {
  Random random;
  const Array<T> emissions = random.array<T>(steps * batch * K, 2), start = random.array<T>(K, 1),
                 end = random.array<T>(K, 1), transitions = random.array<T>(K * K, 1),
                 dvalue = random.array<T>(batch, 1);
  Array<int64_t> lengths(batch), order(batch), tags(steps * batch);
  for (int64_t b = 0; b < batch; ++b) lengths[b] = steps - steps * b / batch, order[b] = b;
  for (int64_t k = 0; k < tags.size(); ++k) tags[k] = k % K;
  for (int64_t k = 0; far && k < emissions.size(); k += 7 * K) emissions[k] = T(-4000);
  for (int64_t k = 0; far && k < K; ++k) transitions[k * K] = -HUGE_VAL;
  ChainCall<T> call{};
  call.steps = steps, call.batch = batch, call.K = K, call.n = n;
  call.emissions = emissions.data(), call.e_step = batch * K, call.e_row = K;
  call.lengths = lengths.data(), call.order = order.data();
  call.start = start.data(), call.end = end.data(), call.transitions = transitions.data();
  call.tags = tags.data(), call.tags_step = batch, call.tags_row = 1;
  call.dvalue = dvalue.data(), call.dvalue_row = 1;
  const auto run_all = [&](int threads) {
    std::vector<Array<T>> out;
    for (int64_t size : {batch, steps * batch * K, steps * batch * K, K, K, K * K, batch * n})
      out.push_back(Array<T>(size));
    Array<int64_t> paths(batch * n * steps);
    call.value = out[0].data(), call.u = out[1].data(), call.demissions = out[2].data();
    call.dstart = out[3].data(), call.dend = out[4].data(), call.dtransitions = out[5].data();
    call.scores = out[6].data(), call.paths = paths.data();
    for (Chains what : {Chains::FORWARD, Chains::BACKWARD, Chains::VITERBI}) {
      call.what = what;
      if (!run(call, threads)) ++failures, std::printf("out of memory\n");
    }
    for (int64_t k = 0; k < paths.size(); ++k) failures += paths[k] < -1 || paths[k] >= K;
    return out;
  };
  const auto same = [&](const std::vector<Array<T>>& one, const std::vector<Array<T>>& other) {
    for (size_t k = 0; k < one.size(); ++k)
      failures += std::memcmp(one[k].data(), other[k].data(), sizeof(T) * one[k].size()) != 0;
  };
  const int before = failures;
  pool.parallel = parallel;
  const std::vector<Array<T>> one = run_all(1);
  same(one, run_all(2)), same(one, run_all(3));
  pool.parallel = alone;
  same(one, run_all(3));
  if (failures > before)
    std::printf("  chains, float%d, T=%d B=%d K=%d n=%d: threads differ\n", int(8 * sizeof(T)),
                int(steps), int(batch), int(K), int(n));
}
