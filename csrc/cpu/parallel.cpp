// Two pools of threads on the same cores, both spinning for work, slow each other down. So there is no second pool: where the
// process has an OpenMP run time (PyTorch brings one), the teams are its threads, found at run time by its exported entry points;
// nothing of OpenMP is linked. Elsewhere threads are started per call.
#include "parallel.h"

#include <barrier>
#include <string>
#include <thread>
#include <vector>

#include "sanitizers.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace fdistill {
namespace {

struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;  // GOMP_parallel
  void (*barrier)() = nullptr;                                             // GOMP_barrier
  int (*rank)() = nullptr;                                                 // omp_get_thread_num
  int (*size)() = nullptr;                                                 // omp_get_num_threads
  std::string name;

  bool found() const { return parallel && barrier && rank && size; }
};

#if defined(__linux__)
// Libraries that export GNU OpenMP's entry points: GNU's own, LLVM's and Intel's.
int visit_library(dl_phdr_info* info, size_t, void* data) {
  auto& omp = *static_cast<OpenMp*>(data);
  const char* base = std::strrchr(info->dlpi_name, '/');
  base = base == nullptr ? info->dlpi_name : base + 1;
  if (std::strncmp(base, "libgomp", 7) && std::strncmp(base, "libomp", 6) && std::strncmp(base, "libiomp", 7)) return 0;
  void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return 0;
  const auto load = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
  };
  load(omp.parallel, "GOMP_parallel");
  load(omp.barrier, "GOMP_barrier");
  load(omp.rank, "omp_get_thread_num");
  load(omp.size, "omp_get_num_threads");
  omp.name = std::string("OpenMP threads of this process (") + base + ")";
  return omp.found();
}
#endif

const OpenMp& openmp() {
  static const OpenMp omp = [] {
    OpenMp found;
#if defined(__linux__)
    // How an OpenMP run time that was built without ThreadSanitizer makes its threads wait is hidden from it.
    if (!sanitizers::kThread) dl_iterate_phdr(visit_library, &found);
#endif
    return found;
  }();
  return omp;
}

struct Call {
  void (*body)(Team&, void*);
  void* data;
};

}  // namespace

void enter_team(void* call_data) {
  const auto& call = *static_cast<Call*>(call_data);
  Team team;
  team.rank = openmp().rank();
  team.size = openmp().size();
  call.body(team, call.data);
}

void Team::barrier() {
  if (size == 1) return;
  if (shared_ == nullptr) return openmp().barrier();
  static_cast<std::barrier<>*>(shared_)->arrive_and_wait();
}

void run_team(int n, void (*body)(Team&, void*), void* data) {
  if (n <= 1) {
    Team team;
    team.rank = 0, team.size = 1;
    return body(team, data);
  }
  if (openmp().found()) {
    Call call{body, data};
    return openmp().parallel(enter_team, &call, static_cast<unsigned>(n), 0);
  }
  std::barrier<> barrier(n);
  const auto member = [&](int rank) {
    Team team;
    team.rank = rank, team.size = n, team.shared_ = &barrier;
    body(team, data);
  };
  std::vector<std::thread> others;
  for (int rank = 1; rank < n; ++rank) others.emplace_back(member, rank);
  member(0);
  for (auto& thread : others) thread.join();
}

const char* threading() {
  return openmp().found() ? openmp().name.c_str() : "threads started per call (no OpenMP run time in this process)";
}

}  // namespace fdistill
