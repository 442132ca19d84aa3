// Work on several threads.
#pragma once

#include <type_traits>

namespace fdistill {

// A member of a running team.
class Team {
 public:
  int rank, size;
  void barrier();

 private:
  friend void run_team(int, void (*)(Team&, void*), void*);
  friend void enter_team(void*);
  void* shared_ = nullptr;
};

// Runs body(team, data) on up to n threads, which may turn out fewer, and waits for them.
void run_team(int n, void (*body)(Team&, void*), void* data);

template <class Body>
void parallel(int n, Body&& body) {
  using Plain = std::remove_reference_t<Body>;
  run_team(n, [](Team& team, void* data) { (*static_cast<Plain*>(data))(team); }, &body);
}

// Whose threads those are, in words.
const char* threading();

}  // namespace fdistill
