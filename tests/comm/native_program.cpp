// The collectives of mlxtp/comm/native as a program of their own, without MLX and
// Python, for sanitizers. Started by mpirun on five ranks it checks worlds of five, of
// four and one, and of three and two, against sums that are made here one element at a
// time. It prints "passed" on rank 0, and ends all ranks where anything is wrong.
// test_native_program.py compiles it, with WITH_ADDRESS_SANITIZER or
// WITH_THREAD_SANITIZER defined.

#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "collectives.h"

#ifdef WITH_ADDRESS_SANITIZER
#include <sanitizer/lsan_interface.h>
#endif

namespace {

using mlxtp::Algorithm;
using mlxtp::Call;
using mlxtp::Collectives;
using mlxtp::Element;
using mlxtp::Shape;
using mlxtp::Shots;
using mlxtp::State;
using namespace std::chrono_literals;

using Bytes = std::vector<char>;

// What a rank of five keeps for other calls: less than the larger calls take.
constexpr size_t kKeptBytes = 300'000;

#ifdef WITH_THREAD_SANITIZER
constexpr bool kWatchesThreads = true;
#else
constexpr bool kWatchesThreads = false;
#endif

const Element kElements[] = {
    Element::boolean, Element::uint8, Element::uint16, Element::uint32, Element::uint64,
    Element::f16,     Element::bf16,  Element::f32,    Element::f64,
};

void check(bool is_right, const std::string& words) {
  if (!is_right) {
    int rank = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    std::fprintf(stderr, "rank %d: wrong: %s\n", rank, words.c_str());
    std::fflush(stderr);
    MPI_Abort(MPI_COMM_WORLD, 1);
  }
}

// 16-bit floats by their definition, with nothing of reduce.h.

struct Format {
  int exponent_bits;
  int mantissa_bits;

  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  uint32_t largest_exponent() const { return (1u << exponent_bits) - 1; }
  uint32_t infinity() const { return largest_exponent() << mantissa_bits; }
  uint32_t quiet() const { return infinity() | (1u << (mantissa_bits - 1)); }
  bool is_nan(uint16_t bits) const { return (bits & 0x7fffu) > infinity(); }
};

constexpr Format kHalf{5, 10};
constexpr Format kBrain{8, 7};

// What is no number is not given here.
float decode(const Format& format, uint16_t bits) {
  const uint32_t exponent = (bits >> format.mantissa_bits) & format.largest_exponent();
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1);
  const float sign = (bits & 0x8000u) != 0 ? -1.0f : 1.0f;
  if (exponent == format.largest_exponent()) {
    return sign * HUGE_VALF;
  }
  const int lowest = 1 - format.bias() - format.mantissa_bits;
  if (exponent == 0) {
    return sign * std::ldexp(float(mantissa), lowest);
  }
  const uint32_t whole = mantissa + (1u << format.mantissa_bits);
  return sign * std::ldexp(float(whole), lowest + int(exponent) - 1);
}

// To nearest, ties to even: in units of the result's last bit, as rint rounds.
uint16_t encode(const Format& format, float value) {
  const uint32_t sign = std::signbit(value) ? 0x8000u : 0;
  if (value == 0 || std::isinf(value)) {
    return uint16_t(sign | (value == 0 ? 0 : format.infinity()));
  }
  const int lowest = 1 - format.bias() - format.mantissa_bits;
  int exponent = 0;
  std::frexp(double(value), &exponent);
  const int last_bit = std::max(exponent - 1 - format.mantissa_bits, lowest);
  const double units = std::rint(std::ldexp(std::fabs(double(value)), -last_bit));
  // The hidden bit of `units` counts as one more exponent, a carry as another.
  const uint32_t rounded =
      (uint32_t(last_bit - lowest) << format.mantissa_bits) + uint32_t(units);
  return uint16_t(sign | std::min(rounded, format.infinity()));
}

// The sum of 16-bit parts in rank order, in float32.
uint16_t serial_sum(const Format& format, const std::vector<uint16_t>& parts) {
  float sum = decode(format, parts[0]);
  for (size_t i = 1; i < parts.size(); ++i) {
    sum += decode(format, parts[i]);
  }
  if (std::isnan(sum)) {  // of two infinities
    return uint16_t((std::signbit(sum) ? 0x8000u : 0) | format.quiet());
  }
  return encode(format, sum);
}

// Every value of a 16-bit type and a few others: what the core makes of their sum. One
// rank of `ranks` takes one value of so many.
void check_16_bits(Element element, const Format& format, int rank, int ranks) {
  const uint32_t one = uint32_t(format.bias()) << format.mantissa_bits;
  const uint32_t step = 1u << format.mantissa_bits;
  // Nothing; what is half of the last bit of 1 to 2, a little more and a little less;
  // one; subnormals; the largest, and half of its last bit; what is no number.
  const uint32_t half_bit = one - uint32_t(format.mantissa_bits + 1) * step;
  const uint32_t top_half_bit =
      format.infinity() - uint32_t(format.mantissa_bits + 2) * step;
  std::vector<std::vector<uint16_t>> others;
  for (const uint32_t other :
       {uint32_t{0}, half_bit, half_bit + 1, half_bit - 1, one, one + 1, uint32_t{1},
        uint32_t{3}, step - 1, step, top_half_bit, top_half_bit - 1,
        format.infinity() - 1, format.infinity(), format.quiet()}) {
    others.push_back({uint16_t(other)});
    others.push_back({uint16_t(other | 0x8000u)});
  }
  // Rounded after each addition, these would be lost.
  others.push_back({uint16_t(half_bit - step), uint16_t(half_bit - step)});
  others.push_back({uint16_t(half_bit), uint16_t(1)});
  others.push_back({uint16_t(format.infinity() - 1), uint16_t(one | 0x8000u)});
  others.push_back({});

  std::vector<uint16_t> all;
  for (uint32_t bits = uint32_t(rank); bits < 65536; bits += uint32_t(ranks)) {
    all.push_back(uint16_t(bits));
  }
  std::vector<uint16_t> sums(all.size());
  for (const std::vector<uint16_t>& more : others) {
    std::vector<std::vector<uint16_t>> parts{all};
    for (const uint16_t other : more) {
      parts.emplace_back(all.size(), other);
    }
    std::vector<const char*> pointers;
    for (const std::vector<uint16_t>& part : parts) {
      pointers.push_back(reinterpret_cast<const char*>(part.data()));
    }
    mlxtp::add(element, pointers, sums.data(), all.size());
    std::vector<uint16_t> added{0};
    added.insert(added.end(), more.begin(), more.end());
    for (size_t i = 0; i < all.size(); ++i) {
      added[0] = all[i];
      const auto is_nan = [&](uint16_t bits) { return format.is_nan(bits); };
      const long nans = std::count_if(added.begin(), added.end(), is_nan);
      bool is_right = false;
      if (nans == 0) {
        is_right = sums[i] == serial_sum(format, added);
      } else if (nans == 1 && added.size() > 1) {
        // It is quiet then, and keeps its sign; float16 keeps its other bits as well.
        const uint16_t nan = *std::find_if(added.begin(), added.end(), is_nan);
        const uint32_t kept = element == Element::f16 ? nan : nan & 0x8000u;
        is_right = sums[i] == (kept | format.quiet());
      } else {
        is_right = is_nan(sums[i]);
      }
      if (!is_right) {
        char words[100];
        std::snprintf(words, sizeof words,
                      "16 bits: %04x and %zu others, the first %04x, give %04x", all[i],
                      more.size(), more.empty() ? 0 : more[0], sums[i]);
        check(false, words);
      }
    }
  }
}

// What a rank gives: all bits of integers; floats of several sizes, so that the order
// of a sum can be seen.
uint64_t noise(uint64_t seed) {
  seed += 0x9e3779b97f4a7c15u;
  seed = (seed ^ (seed >> 30)) * 0xbf58476d1ce4e5b9u;
  seed = (seed ^ (seed >> 27)) * 0x94d049bb133111ebu;
  return seed ^ (seed >> 31);
}

template <typename T>
Bytes values(int rank, size_t count, T (*value)(uint64_t)) {
  Bytes bytes(count * sizeof(T));
  for (size_t i = 0; i < count; ++i) {
    const T element = value(noise(count * 8 + size_t(rank)) + i * 0x2545f4914f6cdd1du);
    std::memcpy(bytes.data() + i * sizeof(T), &element, sizeof(T));
  }
  return bytes;
}

Bytes part_of(int rank, size_t count, Element element) {
  switch (element) {
    case Element::boolean:
      return values<uint8_t>(
          rank, count, [](uint64_t seed) { return uint8_t(noise(seed) % 4 == 0); });
    case Element::uint8:
      return values<uint8_t>(rank, count, [](uint64_t s) { return uint8_t(noise(s)); });
    case Element::uint16:
      return values<uint16_t>(rank, count,
                              [](uint64_t seed) { return uint16_t(noise(seed)); });
    case Element::f16:  // below 2
      return values<uint16_t>(
          rank, count, [](uint64_t seed) { return uint16_t(noise(seed) & 0xbfffu); });
    case Element::bf16:  // 2^-15 to 2
      return values<uint16_t>(rank, count, [](uint64_t seed) {
        return uint16_t((noise(seed) & 0x87ffu) | 0x3800u);
      });
    case Element::uint32:
      return values<uint32_t>(rank, count,
                              [](uint64_t seed) { return uint32_t(noise(seed)); });
    case Element::f32:  // 2^-15 to 2
      return values<uint32_t>(rank, count, [](uint64_t seed) {
        return uint32_t((noise(seed) & 0x87ffffffu) | 0x38000000u);
      });
    case Element::uint64:
      return values<uint64_t>(rank, count, noise);
    case Element::f64:  // 2^-15 to 2
      return values<uint64_t>(rank, count, [](uint64_t seed) {
        return (noise(seed) & 0x80ffffffffffffffu) | 0x3f00000000000000u;
      });
  }
  throw std::logic_error("no such element");
}

template <typename T, typename Add>
Bytes added(const std::vector<Bytes>& parts, Add add) {
  Bytes total = parts[0];
  std::vector<T> elements(parts.size());
  for (size_t start = 0; start < total.size(); start += sizeof(T)) {
    for (size_t rank = 0; rank < parts.size(); ++rank) {
      std::memcpy(&elements[rank], parts[rank].data() + start, sizeof(T));
    }
    const T sum = add(elements);
    std::memcpy(total.data() + start, &sum, sizeof(T));
  }
  return total;
}

template <typename T>
T one_by_one(const std::vector<T>& elements) {
  T sum = elements[0];
  for (size_t rank = 1; rank < elements.size(); ++rank) {
    sum = T(sum + elements[rank]);
  }
  return sum;
}

Bytes expected_sum(int ranks, size_t count, Element element) {
  std::vector<Bytes> parts;
  for (int rank = 0; rank < ranks; ++rank) {
    parts.push_back(part_of(rank, count, element));
  }
  switch (element) {
    case Element::boolean:
      return added<uint8_t>(parts, [](const std::vector<uint8_t>& elements) {
        return *std::max_element(elements.begin(), elements.end());
      });
    case Element::uint8:
      return added<uint8_t>(parts, one_by_one<uint8_t>);
    case Element::uint16:
      return added<uint16_t>(parts, one_by_one<uint16_t>);
    case Element::uint32:
      return added<uint32_t>(parts, one_by_one<uint32_t>);
    case Element::uint64:
      return added<uint64_t>(parts, one_by_one<uint64_t>);
    case Element::f16:
      return added<uint16_t>(parts, [](const std::vector<uint16_t>& elements) {
        return serial_sum(kHalf, elements);
      });
    case Element::bf16:
      return added<uint16_t>(parts, [](const std::vector<uint16_t>& elements) {
        return serial_sum(kBrain, elements);
      });
    case Element::f32:
      return added<float>(parts, one_by_one<float>);
    case Element::f64:
      return added<double>(parts, one_by_one<double>);
  }
  throw std::logic_error("no such element");
}

// Numbered calls, so that a reader of the state can tell whether it fits together.
class Calls {
 public:
  std::shared_ptr<const Call> next(const std::string& name) {
    ++number_;
    const std::string layer = "layer " + std::to_string(number_);
    return std::make_shared<const Call>(Call{name, layer, number_});
  }

 private:
  uint64_t number_ = 0;
};

// Another thread that reads what the core is in, as the heartbeat does.
class Reader {
 public:
  explicit Reader(const Collectives& collectives)
      : thread_([this, &collectives] {
          uint64_t begun = 0;
          double spent = 0;
          while (!done_) {
            const State state = collectives.state();
            const std::string layer =
                state.begun == 0 ? "" : "layer " + std::to_string(state.begun);
            check(state.begun >= begun, "the number of calls falls");
            check(state.layer == layer, "a state of two calls");
            check(state.seconds >= 0 || state.seconds == -1, "seconds of a state");
            check(collectives.seconds() >= spent, "seconds in collectives fall");
            begun = state.begun;
            spent = collectives.seconds();
            std::this_thread::sleep_for(50us);
          }
        }) {}

  ~Reader() {
    done_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> done_{false};
  std::thread thread_;
};

std::vector<Shape> shapes(int ranks) {
  if (ranks <= 3) {
    return {Shape::direct};
  }
  return {Shape::direct, Shape::ring};
}

// A world of some ranks and its collectives.
class World {
 public:
  World(MPI_Comm comm, bool crowded) : collectives_(comm, crowded, kKeptBytes) {}

  void check_all() {
    const Reader reader(collectives_);
    for (const Element element : kElements) {
      if (kWatchesThreads && element != Element::f32) {
        continue;  // sums are checked without
      }
      for (const size_t count : {0, 1, 63, 64, 65, 1000}) {
        check_sum(element, count);
      }
    }
    // In several messages, the last of them short.
    if (!kWatchesThreads) {
      check_sum(Element::bf16, 270'001);
    }
    check_sum(Element::f32, 140'001);
    check_gathers();
    check_changing_sizes();
    const State state = collectives_.state();
    check(state.seconds == -1, "in a collective after the last");
    check(collectives_.seconds() > 0 || size() == 1, "no time in collectives");
    collectives_.close();
  }

 private:
  int rank() const { return collectives_.rank(); }
  int size() const { return collectives_.size(); }

  void check_sum(Element element, size_t count) {
    const Bytes mine = part_of(rank(), count, element);
    const Bytes expected = expected_sum(size(), count, element);
    for (const Shape shape : shapes(size())) {
      for (const Shots shots : {Shots::one, Shots::two}) {
        const Algorithm algorithm{shape, shots};
        const std::string words = "a sum of " + std::to_string(count) + " elements " +
                                  std::to_string(int(element)) + " on " +
                                  std::to_string(size()) + " ranks";
        Bytes out(mine.size());
        collectives_.allreduce(calls_.next("allreduce"), mine.data(), out.data(), count,
                               element, algorithm);
        check(out == expected, words);
        if (count != 1000) {
          continue;
        }
        Bytes in_place = mine;
        collectives_.allreduce(calls_.next("allreduce"), in_place.data(),
                               in_place.data(), count, element, algorithm);
        check(in_place == expected, words + " in place");
      }
    }
  }

  void check_gathers() {
    for (const size_t rows : {0, 1, 3}) {
      std::vector<size_t> uneven;
      for (int other = 0; other < size(); ++other) {
        uneven.push_back(size_t(5 * other + 3) % 7);  // of five ranks none is empty
      }
      check_gather(rows, uneven);
      uneven[0] = 0;
      check_gather(rows, uneven);
      check_gather(rows, std::vector<size_t>(size(), 0));
      check_gather(rows, std::vector<size_t>(size(), 1024));
      for (int root = 0; root < size(); ++root) {  // a broadcast
        std::vector<size_t> widths(size(), 0);
        widths[root] = 40;
        check_gather(rows, widths);
      }
    }
    std::vector<size_t> long_parts(size(), 100'000);  // of several messages
    long_parts.back() = 3;
    check_gather(6, long_parts);
  }

  void check_gather(size_t rows, const std::vector<size_t>& widths) {
    std::vector<Bytes> parts;
    for (int other = 0; other < size(); ++other) {
      parts.push_back(part_of(other, rows * widths[other], Element::uint8));
    }
    Bytes expected;
    for (size_t row = 0; row < rows; ++row) {
      for (int other = 0; other < size(); ++other) {
        const auto begin = parts[other].begin() + long(row * widths[other]);
        expected.insert(expected.end(), begin, begin + long(widths[other]));
      }
    }
    for (const Shape shape : shapes(size())) {
      Bytes out(expected.size());
      collectives_.allgather(calls_.next("allgather"), parts[rank()].data(), out.data(),
                             rows, widths, shape);
      check(out == expected, "a gather of " + std::to_string(rows) + " rows");
    }
  }

  // Buffers are given up in favour of others and made anew, while messages come late.
  void check_changing_sizes() {
    for (int turn = 0; turn < 60; ++turn) {
      const size_t count = 1 + noise(turn) % 20'000;
      const size_t again = turn % 3 == 0 ? 500 : count;
      const std::vector<Shape> all = shapes(size());
      const Algorithm algorithm{all[noise(turn + 1000) % all.size()],
                                turn % 2 == 0 ? Shots::one : Shots::two};
      std::vector<uint32_t> mine(again, uint32_t(rank() + turn));
      collectives_.allreduce(calls_.next("allreduce"), mine.data(), mine.data(), again,
                             Element::uint32, algorithm);
      const uint32_t total = uint32_t(size() * (size() - 1) / 2 + size() * turn);
      check(std::count(mine.begin(), mine.end(), total) == long(again),
            "a sum among changing sizes");
      if (turn == 40) {
        collectives_.forget();
      }
    }
  }

  Collectives collectives_;
  Calls calls_;
};

// A rank that does not come: the others' waits are ended by another thread of theirs.
void check_stop(MPI_Comm comm, Algorithm algorithm) {
#ifdef WITH_ADDRESS_SANITIZER
  // MPI may still write where buffers of a wait that was ended are: they stay.
  const __lsan::ScopedDisabler leaks_on_purpose;
#endif
  Calls calls;
  Collectives collectives(comm, true, kKeptBytes);
  std::vector<float> x(1000, 1);
  const auto allreduce = [&] {
    collectives.allreduce(calls.next("allreduce"), x.data(), x.data(), x.size(),
                          Element::f32, algorithm);
  };
  allreduce();
  check(x[0] == float(collectives.size()), "a sum before a stop");
  if (collectives.rank() == 1) {
    return;
  }
  std::thread stopping([&] {
    while (collectives.state().begun < 2 || collectives.state().seconds < 0.01) {
      std::this_thread::sleep_for(1ms);
    }
    collectives.stop("rank 1 is lost");
    collectives.stop("another reason");
  });
  for (int call = 0; call < 2; ++call) {
    std::string words;
    try {
      allreduce();
    } catch (const std::runtime_error& error) {
      words = error.what();
    }
    check(words == "rank 1 is lost", "a wait that was ended says '" + words + "'");
    check(collectives.state().begun == 2, "the call that was ended is not the last");
    check(collectives.state().seconds == -1, "in a collective after its end");
  }
  stopping.join();
  check(collectives.stopped(), "not stopped");
  collectives.close();
}

MPI_Comm split(int color, int key) {
  MPI_Comm comm = MPI_COMM_NULL;
  MPI_Comm_split(MPI_COMM_WORLD, color, key, &comm);
  return comm;
}

}  // namespace

int main(int count, char** words) {
  int provided = 0;
  MPI_Init_thread(&count, &words, MPI_THREAD_MULTIPLE, &provided);
  check(provided == MPI_THREAD_MULTIPLE, "MPI_THREAD_MULTIPLE is not provided");
  int rank = 0;
  int size = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  check(size == 5, "started on another number of ranks than five");

  if (!kWatchesThreads) {  // one thread alone, and slow there
    check_16_bits(Element::f16, kHalf, rank, size);
    check_16_bits(Element::bf16, kBrain, rank, size);
  }

  // As MLX does, in another thread than the one that has started MPI; which goes on
  // with calls of its own meanwhile.
  std::atomic<bool> done{false};
  World world(MPI_COMM_WORLD, true);
  std::thread all([&] {
    world.check_all();
    done = true;
  });
  for (int everyone = 0; everyone == 0;) {
    const int mine = done ? 1 : 0;
    MPI_Request request = MPI_REQUEST_NULL;
    MPI_Iallreduce(&mine, &everyone, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD, &request);
    for (int is_done = 0; is_done == 0;) {
      std::this_thread::sleep_for(1ms);
      MPI_Test(&request, &is_done, MPI_STATUS_IGNORE);
    }
  }
  all.join();

  // In these worlds ranks have other numbers than in the job's.
  MPI_Comm comm = split(rank < 4 ? 0 : 1, -rank);
  World(comm, true).check_all();
  if (rank < 4) {
    check_stop(comm, {Shape::direct, Shots::two});
  }
  comm = split(rank % 2, -rank);
  World(comm, false).check_all();
  comm = split(0, rank);
  check_stop(comm, {Shape::ring, Shots::one});

  MPI_Barrier(MPI_COMM_WORLD);
  if (rank == 0) {
    std::puts("passed");
  }
  MPI_Finalize();
}
