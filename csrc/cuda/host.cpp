// Kernels on the host, as a library that tests load in place of a GPU. FASTSEQ_HOST_KERNELS names the
// file that defines them: kernels.cu with FASTSEQ_UNIT=host and a list FASTSEQ_KERNELS_host(X) of some
// of its own, or a test's.
#include FASTSEQ_HOST_KERNELS

namespace {

thread_local std::string message;

}  // namespace

extern "C" {

// Their names, each with the most threads that a CTA of it may have: "name threads ...".
const char* fastseq_host_kernels() {
  static const std::string names = [] {
    std::string all;
    for (const fastseq::host::Kernel& kernel : fastseq::host::kernels())
      all += std::string(kernel.name) + " " + std::to_string(kernel.threads) + " ";
    return all;
  }();
  return names.c_str();
}

const char* fastseq_host_fields() { return fastseq::ARGUMENT_NAMES; }

// Why the last launch of this thread failed.
const char* fastseq_host_message() { return message.c_str(); }

// What launches to come keep back, at random; from 0 nothing.
void fastseq_host_seed(int64_t seed) { fastseq::host::seed = seed; }

// 0 when the kernel has run. `cluster` neighbours in x are a cluster; `together`: all of the grid at
// once.
int fastseq_host_launch(const char* name, int64_t gx, int64_t gy, int64_t gz, int threads,
                        int64_t shared, int cluster, int together, const void* arguments,
                        int64_t size) {
  fastseq::Arguments given;
  if (size != sizeof given) {
    message = "expected " + std::to_string(sizeof given) + " bytes of arguments";
    return 1;
  }
  std::memcpy(&given, arguments, sizeof given);
  for (const fastseq::host::Kernel& kernel : fastseq::host::kernels())
    if (!std::strcmp(kernel.name, name)) {
      message = fastseq::host::run(kernel, gx, gy, gz, threads, shared, given, together, cluster);
      return message.empty() ? 0 : 1;
    }
  message = std::string("no kernel is called ") + name;
  return 1;
}

}  // extern "C"
