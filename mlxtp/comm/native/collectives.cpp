#include "collectives.h"

#include <sched.h>

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <numeric>
#include <utility>

namespace mlxtp {

namespace {

// As in comm/gathers.py: longer parts go as several messages.
constexpr size_t kPieceBytes = 512UL * 1024;
// As in comm/codec.py: blocks are cut between groups of so many elements.
constexpr size_t kGroupSize = 64;
// Polls before a rank that waits makes room for others: by a yield, and by a nap where
// ranks outnumber the cores or something is computed meanwhile.
constexpr int kBusyPolls = 200;
constexpr int kYieldingPolls = 100;
constexpr timespec kNap = {0, 50'000};
// After so long a wait, and again after so many polls, it looks for messages that
// nobody expects.
constexpr std::chrono::seconds kLongWait{1};
constexpr int kPollsOfLongWait = 1000;
// As in comm/transports/mpi.py: messages of unlike sizes have unlike tags.
constexpr int kMarks = 1021;

int marked(int tag, size_t bytes) { return tag * kMarks + int(bytes % kMarks); }

struct Piece {
  size_t start;
  size_t stop;
  int number;
};

// The messages that a part is cut into, as far as they lie between `start` and `stop`.
std::vector<Piece> pieces(size_t bytes, size_t start, size_t stop) {
  std::vector<Piece> all;
  int number = 0;
  for (size_t low = 0; low < bytes; low += kPieceBytes, ++number) {
    const size_t high = std::min({low + kPieceBytes, bytes, stop});
    const Piece piece{std::max(start, low), high, number};
    if (piece.start < piece.stop) {
      all.push_back(piece);
    }
  }
  return all;
}

std::vector<Piece> pieces(size_t bytes) { return pieces(bytes, 0, bytes); }

// Beginning with the next rank, so that not all send to rank 0 first.
std::vector<int> peers(const Ranks& ranks) {
  std::vector<int> all(ranks.size() - 1);
  for (int i = 0; i + 1 < ranks.size(); ++i) {
    all[i] = (ranks.rank() + 1 + i) % ranks.size();
  }
  return all;
}

void free_requests(Requests& requests) {
  for (MPI_Request& request : requests) {
    if (request != MPI_REQUEST_NULL) {
      MPI_Request_free(&request);
    }
  }
}

void check(int code) {
  if (code == MPI_SUCCESS) {
    return;
  }
  char words[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, words, &length);
  throw std::runtime_error("MPI: " + std::string(words, length));
}

[[noreturn]] void throw_other(const Expected& expected) {
  throw std::runtime_error("rank " + std::to_string(expected.from) +
                           " sent another number of bytes than the " +
                           std::to_string(expected.bytes) +
                           " expected: ranks have called different collectives");
}

void start(Requests& requests) {
  if (!requests.empty()) {
    check(MPI_Startall(int(requests.size()), requests.data()));
  }
}

}  // namespace

// How a rank waits between two polls.
class Ranks::Patience {
 public:
  explicit Patience(const Ranks& ranks) : ranks_(ranks) {}

  void wait(const Requests& requests, const std::vector<Expected>& expected) {
    ranks_.throw_if_stopped();
    ++polls_;
    if (polls_ % kPollsOfLongWait == 0 && Clock::now() - begin_ > kLongWait) {
      ranks_.look_for_others(requests, expected);
    }
    if (!ranks_.makes_room_ && polls_ <= kBusyPolls) {
      return;
    }
    if (!ranks_.makes_room_ || polls_ <= kYieldingPolls) {
      sched_yield();
    } else {
      nanosleep(&kNap, nullptr);
    }
  }

 private:
  const Ranks& ranks_;
  const Clock::time_point begin_ = Clock::now();
  int polls_ = 0;
};

Ranks::Ranks(MPI_Comm comm, bool crowded) : crowded_(crowded), makes_room_(crowded) {
  check(MPI_Comm_dup(comm, &comm_));
  check(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN));
  check(MPI_Comm_rank(comm_, &rank_));
  check(MPI_Comm_size(comm_, &size_));
}

void Ranks::send(Requests& requests, const char* data, size_t bytes, int to, int tag) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Isend(data, int(bytes), MPI_BYTE, to, marked(tag, bytes), comm_, &request));
  requests.push_back(request);
}

MPI_Request Ranks::prepare_send(const char* data, size_t bytes, int to, int tag) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Send_init(data, int(bytes), MPI_BYTE, to, marked(tag, bytes), comm_,
                      &request));
  return request;
}

void Ranks::prepare_receive(Receives& receives, char* data, size_t bytes, int from,
                            int tag) {
  MPI_Request request = MPI_REQUEST_NULL;
  check(MPI_Recv_init(data, int(bytes), MPI_BYTE, from, marked(tag, bytes), comm_,
                      &request));
  receives.requests.push_back(request);
  receives.expected.push_back({from, int(bytes)});
}

// Throws if the message whose status is at `place` is not the expected one.
void Ranks::check_message(int code, int place, const Expected& expected) const {
  const MPI_Status& status = statuses_[place];
  int kind = MPI_SUCCESS;
  if (code == MPI_ERR_IN_STATUS && status.MPI_ERROR != MPI_ERR_PENDING) {
    MPI_Error_class(status.MPI_ERROR, &kind);
  }
  int count = expected.bytes;
  if (kind == MPI_SUCCESS && code == MPI_SUCCESS) {
    check(MPI_Get_count(&status, MPI_BYTE, &count));
  }
  if (kind == MPI_ERR_TRUNCATE || count != expected.bytes) {
    throw_other(expected);
  }
  if (kind != MPI_SUCCESS) {
    check(status.MPI_ERROR);
  }
}

// Throws if a rank whose message is missing has sent another one. Messages of one rank
// are matched in the order in which it sent them: so that one comes in place of the
// missing, and not behind it.
void Ranks::look_for_others(const Requests& requests,
                            const std::vector<Expected>& expected) const {
  for (size_t place = 0; place < expected.size(); ++place) {
    int is_there = 0;
    int is_done = 0;
    check(MPI_Iprobe(expected[place].from, MPI_ANY_TAG, comm_, &is_there,
                     MPI_STATUS_IGNORE));
    check(MPI_Request_get_status(requests[place], &is_done, MPI_STATUS_IGNORE));
    if (is_there != 0 && is_done == 0) {
      throw_other(expected[place]);
    }
  }
}

void Ranks::wait(Requests& requests, const std::vector<Expected>& expected) {
  const int count = int(requests.size());
  statuses_.resize(requests.size());
  int done = 0;
  for (Patience patience(*this);; patience.wait(requests, expected)) {
    const int code = MPI_Testall(count, requests.data(), &done, statuses_.data());
    if (done != 0 || code != MPI_SUCCESS) {
      for (int place = 0; std::cmp_less(place, expected.size()); ++place) {
        check_message(code, place, expected[place]);
      }
      check(code);
      return;
    }
  }
}

void Ranks::wait_some(Requests& requests, const std::vector<Expected>& expected,
                      std::vector<int>& done) {
  const int count = int(requests.size());
  statuses_.resize(requests.size());
  done.resize(requests.size());
  int number = 0;
  for (Patience patience(*this);; patience.wait(requests, expected)) {
    const int code =
        MPI_Testsome(count, requests.data(), &number, done.data(), statuses_.data());
    if (number != 0 || code != MPI_SUCCESS) {
      for (int place = 0; place < number; ++place) {
        check_message(code, place, expected[done[place]]);
      }
      check(code);
      done.resize(number);
      return;
    }
  }
}

void Ranks::stop(const std::string& words) {
  const std::scoped_lock lock(stopping_);
  if (!stopped_) {
    words_ = words;
    stopped_ = true;
  }
}

void Ranks::throw_if_stopped() const {
  if (stopped_) {
    throw std::runtime_error(words_);
  }
}

void Ranks::close() { MPI_Comm_free(&comm_); }

Gather::Gather(Ranks& ranks, const std::vector<size_t>& bytes)
    : ranks_(ranks), starts_(bytes.size() + 1, 0) {
  std::partial_sum(bytes.begin(), bytes.end(), starts_.begin() + 1);
  joined_.resize(starts_.back());
}

void Gather::free() { free_requests(receives_.requests); }

namespace {

// Sends to everyone and receives from everyone, all at once.
class DirectGather : public Gather {
 public:
  DirectGather(Ranks& ranks, const std::vector<size_t>& bytes)
      : Gather(ranks, bytes), peers_(peers(ranks)) {
    for (const int peer : peers_) {
      for (const Piece& piece : pieces(this->bytes(peer))) {
        ranks.prepare_receive(receives_, part(peer) + piece.start,
                              piece.stop - piece.start, peer, peer);
      }
    }
  }

  void run(const char* mine) override {
    start(receives_.requests);
    live_ = receives_.requests;
    const int rank = ranks_.rank();
    for (const Piece& piece : pieces(bytes(rank))) {
      for (const int peer : peers_) {
        ranks_.send(live_, mine + piece.start, piece.stop - piece.start, peer, rank);
      }
    }
    ranks_.wait(live_, receives_.expected);
  }

 private:
  std::vector<int> peers_;
  Requests live_;
};

// Sends to both neighbours, and passes on what comes from one to the other.
//
// For at least four ranks: with fewer all are neighbours. With an even number the part
// of the rank opposite comes in two halves, one from each side.
class RingGather : public Gather {
 public:
  RingGather(Ranks& ranks, const std::vector<size_t>& bytes) : Gather(ranks, bytes) {
    const int size = ranks.size();
    const int rank = ranks.rank();
    neighbours_[0] = (rank + size - 1) % size;
    neighbours_[1] = (rank + 1) % size;
    const int hops = size / 2;
    for (int hop = 1; hop <= hops; ++hop) {
      for (int side = 0; side < 2; ++side) {
        const int origin = (rank + size + (side == 0 ? -hop : hop)) % size;
        for (const Piece& piece : travelling(origin, hop, side)) {
          ranks.prepare_receive(receives_, part(origin) + piece.start,
                                piece.stop - piece.start, neighbours_[side],
                                tag(origin, piece, side));
          forwards_.push_back(MPI_REQUEST_NULL);
          for (const Piece& next :
               hop < hops ? travelling(origin, hop + 1, side) : std::vector<Piece>()) {
            if (next.number == piece.number) {
              forwards_.back() =
                  ranks.prepare_send(part(origin) + next.start, next.stop - next.start,
                                     neighbours_[1 - side], tag(origin, next, side));
            }
          }
        }
      }
    }
  }

  void run(const char* mine) override {
    start(receives_.requests);
    live_.clear();
    for (const Piece& piece : pieces(bytes(ranks_.rank()))) {
      for (int side = 0; side < 2; ++side) {
        ranks_.send(live_, mine + piece.start, piece.stop - piece.start,
                    neighbours_[1 - side], tag(ranks_.rank(), piece, side));
      }
    }
    waiting_ = receives_.requests;
    for (size_t missing = waiting_.size(); missing > 0; missing -= done_.size()) {
      ranks_.wait_some(waiting_, receives_.expected, done_);
      starting_.clear();
      for (const int place : done_) {
        if (forwards_[place] != MPI_REQUEST_NULL) {
          starting_.push_back(forwards_[place]);
        }
      }
      start(starting_);
      live_.insert(live_.end(), starting_.begin(), starting_.end());
    }
    ranks_.wait(live_, {});
  }

  void free() override {
    Gather::free();
    free_requests(forwards_);
  }

 private:
  // What travels of a part on its `hop`th hop, coming from `side`.
  std::vector<Piece> travelling(int origin, int hop, int side) const {
    const size_t all = bytes(origin);
    if (2 * hop != ranks_.size()) {
      return pieces(all);
    }
    return side == 0 ? pieces(all, 0, all / 2) : pieces(all, all / 2, all);
  }

  int tag(int origin, const Piece& piece, int side) const {
    return 2 * (ranks_.size() * piece.number + origin) + side;
  }

  int neighbours_[2];
  Requests forwards_;  // of each receive the send that passes it on, if any does
  Requests live_, waiting_, starting_;
  std::vector<int> done_;
};

std::unique_ptr<Gather> make_gather(Ranks& ranks, Shape shape,
                                    const std::vector<size_t>& bytes) {
  if (shape == Shape::ring) {
    return std::make_unique<RingGather>(ranks, bytes);
  }
  return std::make_unique<DirectGather>(ranks, bytes);
}

}  // namespace

class Plan {
 public:
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  virtual ~Plan() = default;
  virtual void run(const char* x, char* out) = 0;
  virtual void free() = 0;
};

namespace {

// Everyone gets every part and adds them.
class OneShot : public Plan {
 public:
  OneShot(Ranks& ranks, Shape shape, size_t count, Element element)
      : rank_(ranks.rank()),
        count_(count),
        element_(element),
        gather_(
            make_gather(ranks, shape,
                        std::vector<size_t>(ranks.size(), count * size_of(element)))) {
    for (int rank = 0; rank < ranks.size(); ++rank) {
      parts_.push_back(gather_->part(rank));
    }
  }

  void run(const char* x, char* out) override {
    gather_->run(x);
    parts_[rank_] = x;
    add(element_, parts_, out, count_);
  }

  void free() override { gather_->free(); }

 private:
  int rank_;
  size_t count_;
  Element element_;
  std::unique_ptr<Gather> gather_;
  std::vector<const char*> parts_;
};

// Everyone gets all parts of one block and adds them, then all gather the blocks.
class TwoShot : public Plan {
 public:
  TwoShot(Ranks& ranks, Shape shape, size_t count, Element element)
      : ranks_(ranks), element_(element), peers_(peers(ranks)) {
    const size_t size = ranks.size();
    const size_t groups = (count + kGroupSize - 1) / kGroupSize;
    starts_.push_back(0);
    for (size_t rank = 0, stop = 0; rank < size; ++rank) {
      stop += groups / size + (rank < groups % size ? 1 : 0);
      starts_.push_back(std::min(stop * kGroupSize, count) * size_of(element));
    }
    std::vector<size_t> bytes(size);
    for (size_t rank = 0; rank < size; ++rank) {
      bytes[rank] = starts_[rank + 1] - starts_[rank];
    }
    gather_ = make_gather(ranks, shape, bytes);
    mine_ = bytes[ranks.rank()];
    received_.resize(size * mine_);
    for (size_t rank = 0; rank < size; ++rank) {
      parts_.push_back(received_.data() + rank * mine_);
    }
    for (const int peer : peers_) {
      for (const Piece& piece : pieces(mine_)) {
        ranks.prepare_receive(receives_, received_.data() + peer * mine_ + piece.start,
                              piece.stop - piece.start, peer, peer);
      }
    }
  }

  void run(const char* x, char* out) override {
    const int rank = ranks_.rank();
    start(receives_.requests);
    live_ = receives_.requests;
    for (const int peer : peers_) {
      for (const Piece& piece : pieces(starts_[peer + 1] - starts_[peer])) {
        const char* data = x + starts_[peer] + piece.start;
        ranks_.send(live_, data, piece.stop - piece.start, peer, rank);
      }
    }
    ranks_.wait(live_, receives_.expected);
    parts_[rank] = x + starts_[rank];
    char* sum = gather_->part(rank);
    add(element_, parts_, sum, mine_ / size_of(element_));
    gather_->run(sum);
    if (starts_.back() > 0) {
      std::memcpy(out, gather_->joined(), starts_.back());
    }
  }

  void free() override {
    free_requests(receives_.requests);
    gather_->free();
  }

 private:
  Ranks& ranks_;
  Element element_;
  std::vector<int> peers_;
  std::vector<size_t> starts_;  // of the blocks, in bytes
  std::unique_ptr<Gather> gather_;
  size_t mine_;  // bytes of this rank's block
  std::vector<char> received_;
  std::vector<const char*> parts_;
  Receives receives_;
  Requests live_;
};

// Everyone gets every part, and joins their rows.
class Join : public Plan {
 public:
  Join(Ranks& ranks, Shape shape, size_t rows, const std::vector<size_t>& widths)
      : rank_(ranks.rank()), rows_(rows), widths_(widths) {
    std::vector<size_t> bytes = widths;
    for (size_t& each : bytes) {
      each *= rows;
    }
    gather_ = make_gather(ranks, shape, bytes);
  }

  void run(const char* x, char* out) override {
    gather_->run(x);
    const size_t row_bytes = std::accumulate(widths_.begin(), widths_.end(), size_t{0});
    size_t start = 0;
    for (int rank = 0; std::cmp_less(rank, widths_.size()); ++rank) {
      const char* part = rank == rank_ ? x : gather_->part(rank);
      const size_t width = widths_[rank];
      for (size_t row = 0; width > 0 && row < rows_; ++row) {
        std::memcpy(out + row * row_bytes + start, part + row * width, width);
      }
      start += width;
    }
  }

  void free() override { gather_->free(); }

 private:
  int rank_;
  size_t rows_;
  std::vector<size_t> widths_;
  std::unique_ptr<Gather> gather_;
};

}  // namespace

// Notes that a collective is under way, for as long as it lives.
class Collectives::Noted {
 public:
  Noted(Collectives& collectives, const std::shared_ptr<const Call>& call)
      : collectives_(collectives) {
    collectives_.ranks_.throw_if_stopped();
    const std::scoped_lock lock(collectives_.noting_);
    collectives_.last_ = call;
    collectives_.waiting_ = true;
    collectives_.since_ = Clock::now();
  }

  ~Noted() {
    const std::scoped_lock lock(collectives_.noting_);
    collectives_.waiting_ = false;
    const std::chrono::nanoseconds taken = Clock::now() - collectives_.since_;
    collectives_.nanoseconds_ += taken.count();
  }

  Noted(const Noted&) = delete;
  Noted& operator=(const Noted&) = delete;

 private:
  Collectives& collectives_;
};

Collectives::Collectives(MPI_Comm comm, bool crowded, size_t kept_bytes)
    : ranks_(comm, crowded), most_kept_bytes_(kept_bytes) {}

Collectives::~Collectives() {
  if (ranks_.stopped()) {
    for (auto& [key, kept] : kept_) {
      const Plan* abandoned = kept.plan.release();  // MPI may still write there
      static_cast<void>(abandoned);
    }
  }
}

void Collectives::fail(const Call& call, const std::string& words) {
  if (!ranks_.stopped()) {
    const std::scoped_lock lock(noting_);
    failure_ = call.name + " " + std::to_string(call.number) +
               (call.layer.empty() ? "" : " of " + call.layer) + ": " + words;
    ranks_.stop(failure_);
  }
  ranks_.throw_if_stopped();
  std::abort();  // not reached
}

template <typename Work>
void Collectives::make(const std::shared_ptr<const Call>& call, Work work) {
  const std::scoped_lock lock(making_);
  const Noted noted(*this, call);
  ranks_.make_room(call->apart);
  try {
    work();
  } catch (const std::exception& error) {
    fail(*call, error.what());
  }
}

void Collectives::allreduce(const std::shared_ptr<const Call>& call, const void* x,
                            void* out, size_t count, Element element,
                            Algorithm algorithm) {
  make(call, [&] {
    const auto [shape, shots] = algorithm;
    const Key key{int(shape), shots == Shots::one ? 1 : 2, int(element), {count}};
    const size_t bytes = count * size_of(element);
    const size_t buffers = shots == Shots::one ? size() : 2;
    Plan& kept = plan(key, bytes * buffers, [&]() -> std::unique_ptr<Plan> {
      if (shots == Shots::one) {
        return std::make_unique<OneShot>(ranks_, shape, count, element);
      }
      return std::make_unique<TwoShot>(ranks_, shape, count, element);
    });
    kept.run(static_cast<const char*>(x), static_cast<char*>(out));
  });
}

void Collectives::allgather(const std::shared_ptr<const Call>& call, const void* x,
                            void* out, size_t rows, const std::vector<size_t>& widths,
                            Shape shape) {
  make(call, [&] {
    std::vector<size_t> sizes = widths;
    sizes.push_back(rows);
    const size_t bytes =
        rows * std::accumulate(widths.begin(), widths.end(), size_t{0});
    Plan& kept = plan(Key{int(shape), 0, 0, sizes}, bytes, [&] {
      return std::make_unique<Join>(ranks_, shape, rows, widths);
    });
    kept.run(static_cast<const char*>(x), static_cast<char*>(out));
  });
}

// Takes what is kept under `key`, or makes it in the room of what was used longest ago.
template <typename Make>
Plan& Collectives::plan(const Key& key, size_t bytes, Make make) {
  auto place = kept_.find(key);
  if (place == kept_.end()) {
    while (!kept_.empty() && kept_bytes_ + bytes > most_kept_bytes_) {
      auto oldest = kept_.begin();
      for (auto other = kept_.begin(); other != kept_.end(); ++other) {
        oldest = other->second.used < oldest->second.used ? other : oldest;
      }
      oldest->second.plan->free();
      kept_bytes_ -= oldest->second.bytes;
      kept_.erase(oldest);
    }
    place = kept_.emplace(key, Kept{make(), bytes, 0}).first;
    kept_bytes_ += bytes;
  }
  place->second.used = ++uses_;
  return *place->second.plan;
}

State Collectives::state() const {
  const std::scoped_lock lock(noting_);
  State state;
  state.failure = failure_;
  if (last_ != nullptr) {
    const std::chrono::duration<double> since = Clock::now() - since_;
    state.begun = last_->number;
    state.name = last_->name;
    state.layer = last_->layer;
    state.seconds = waiting_ ? since.count() : -1;
  }
  return state;
}

double Collectives::seconds() const { return double(nanoseconds_) * 1e-9; }

void Collectives::forget() {
  const std::scoped_lock lock(making_);
  for (auto& [key, kept] : kept_) {
    kept.plan->free();
  }
  kept_.clear();
  kept_bytes_ = 0;
}

void Collectives::close() {
  if (ranks_.stopped()) {
    return;
  }
  forget();
  ranks_.close();
  ranks_.stop("the communicator is closed");
}

}  // namespace mlxtp
