// Allreduces and allgathers of memory, made out of MPI's sends and receives.
//
// The algorithms are those of comm/allreduce.py and comm/gathers.py, where they are
// described, and the sums are the same to the bit.
#pragma once

#include <mpi.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include "reduce.h"

namespace mlxtp {

using Requests = std::vector<MPI_Request>;
using Clock = std::chrono::steady_clock;

// A collective as messages name it. `number` counts the calls of this rank, from 1.
// With `apart` this rank computes something else meanwhile, so a wait leaves the core
// to it.
struct Call {
  std::string name;
  std::string layer;
  uint64_t number;
  bool apart = false;
};

// The last collective that was begun, and for how many seconds it has been under way:
// -1 if it is done. `failure` says which one failed, and why; "" if none did.
struct State {
  uint64_t begun = 0;
  std::string name;
  std::string layer;
  double seconds = -1;
  std::string failure;
};

// What a receive expects.
struct Expected {
  int from;
  int bytes;
};

// Persistent receives, and what each expects.
struct Receives {
  Requests requests;
  std::vector<Expected> expected;
};

// The other ranks, and how this one waits for them.
class Ranks {
 public:
  // Works on a duplicate of `comm`: all ranks make theirs at once. With `crowded`,
  // ranks outnumber the cores, and one that waits makes room for one that computes.
  Ranks(MPI_Comm comm, bool crowded);

  int rank() const { return rank_; }
  int size() const { return size_; }

  void send(Requests& requests, const char* data, size_t bytes, int to, int tag);
  MPI_Request prepare_send(const char* data, size_t bytes, int to, int tag);
  void prepare_receive(Receives& receives, char* data, size_t bytes, int from, int tag);

  // Waits until all are done. The first of them are receives; it is an error if another
  // message comes than the one that is expected.
  void wait(Requests& requests, const std::vector<Expected>& expected);
  // Waits until at least one is done; gives the places of those that now are.
  void wait_some(Requests& requests, const std::vector<Expected>& expected,
                 std::vector<int>& done);

  // Lets every wait, now and later, throw std::runtime_error with these words. Only the
  // first call counts.
  void stop(const std::string& words);
  void throw_if_stopped() const;
  bool stopped() const { return stopped_; }

  // Says whether waits from now on make room for what computes, as if crowded.
  void make_room(bool wanted) { makes_room_ = crowded_ || wanted; }

  void close();

 private:
  class Patience;
  void check_message(int code, int place, const Expected& expected) const;
  void look_for_others(const Requests& requests,
                       const std::vector<Expected>& expected) const;

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
  const bool crowded_;
  bool makes_room_;
  std::atomic<bool> stopped_{false};
  std::string words_;  // written once, before stopped_
  std::mutex stopping_;
  std::vector<MPI_Status> statuses_;
};

// How every rank gets every rank's part. `joined` has them in rank order; a gather
// fills all but the rank's own.
class Gather {
 public:
  Gather(Ranks& ranks, const std::vector<size_t>& bytes);
  Gather(const Gather&) = delete;
  Gather& operator=(const Gather&) = delete;
  virtual ~Gather() = default;

  // Sends this rank's part and returns when all parts are here and `mine` may change.
  virtual void run(const char* mine) = 0;
  virtual void free();

  char* part(int rank) { return joined_.data() + starts_[rank]; }
  size_t bytes(int rank) const { return starts_[rank + 1] - starts_[rank]; }
  const char* joined() const { return joined_.data(); }

 protected:
  Ranks& ranks_;
  std::vector<size_t> starts_;
  std::vector<char> joined_;
  Receives receives_;
};

enum class Shape { ring, direct };
enum class Shots { one, two };
struct Algorithm {
  Shape shape;
  Shots shots;
};

// Buffers and requests of collectives of one kind and size.
class Plan;

// All collectives of one communicator, with buffers that are kept. Every rank makes
// them in the same order; all calls may come from any thread. After an exception MPI
// may still read and write the memory that was given: it has to stay.
class Collectives {
 public:
  // Buffers are kept for the sizes used last, up to `kept_bytes`.
  Collectives(MPI_Comm comm, bool crowded, size_t kept_bytes = 256UL * 1024 * 1024);
  ~Collectives();
  Collectives(const Collectives&) = delete;
  Collectives& operator=(const Collectives&) = delete;

  int rank() const { return ranks_.rank(); }
  int size() const { return ranks_.size(); }

  // out (count,) is the sum of all ranks' x (count,). It may be the same memory.
  void allreduce(const std::shared_ptr<const Call>& call, const void* x, void* out,
                 size_t count, Element element, Algorithm algorithm);

  // out (rows, sum of widths) joins the ranks' x (rows, widths[rank]); widths in bytes.
  void allgather(const std::shared_ptr<const Call>& call, const void* x, void* out,
                 size_t rows, const std::vector<size_t>& widths, Shape shape);

  State state() const;
  // Seconds in collectives, all together.
  double seconds() const;
  void stop(const std::string& words) { ranks_.stop(words); }
  // Stops all of them because this one cannot be made, and throws. Nothing works any
  // more: requests may be under way, and other ranks have made what this one has not.
  [[noreturn]] void fail(const Call& call, const std::string& words);
  bool stopped() const { return ranks_.stopped(); }
  // Gives up buffers and requests.
  void forget();
  // Parts from the others, when all ranks do. Nothing is called afterwards.
  void close();

 private:
  // What is kept for: shape, shots (0 for a gather), element and sizes.
  using Key = std::tuple<int, int, int, std::vector<size_t>>;
  struct Kept {
    std::unique_ptr<Plan> plan;
    size_t bytes;
    uint64_t used;
  };
  class Noted;

  template <typename Make>
  Plan& plan(const Key& key, size_t bytes, Make make);
  template <typename Work>
  void make(const std::shared_ptr<const Call>& call, Work work);

  Ranks ranks_;
  std::mutex making_;
  std::map<Key, Kept> kept_;
  size_t kept_bytes_ = 0;
  const size_t most_kept_bytes_;
  uint64_t uses_ = 0;

  mutable std::mutex noting_;
  std::shared_ptr<const Call> last_;
  bool waiting_ = false;
  std::string failure_;
  Clock::time_point since_;
  std::atomic<int64_t> nanoseconds_{0};
};

}  // namespace mlxtp
