// The functions of kernels/cuda/primitives.cuh on a CPU, so that g++ compiles the kernel and a test runs it.
//
// A CUDA thread is a context of its own, and one of those that can go on is drawn at random. Bulk copies
// happen at some later time, in any order, a copy out in two steps: it reads, then it writes. Shared
// memory is kept twice, as threads see it and as copies do: what a thread stores gets to the copies with
// its fence. Without one they see what was there before; a deadlock, a barrier that counts too far, lanes
// that meet at different instructions and traffic into a block that has ended are errors. What is not
// here: the order of memory between threads, banks, and time.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
#define DEVICE inline
#define __global__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
using std::min;
struct float2 { float x, y; };
struct Place { int x; };
inline Place threadIdx, blockIdx, gridDim;

// -- threads, blocks, a cluster -------------------------------------------------------------------------

struct Copy {
  std::function<void()> read, write;
  bool has_read = false, done = false;
};

struct Meeting {
  int present = 0;
  unsigned generation = 0;
  const char* at = nullptr;
};

struct Warp {
  Meeting meeting;
  const void* address[32];
  u32 a[32][4], b[32][2];
  float value[32];
};

struct Block {
  std::vector<unsigned char> shared, copied;  // as threads and as copies see it
  std::vector<Warp> warps;
  Meeting meeting;
  int running;
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  int index, number, rank;  // in the block; of the block; of the block in its cluster
  std::function<bool()> ready = [] { return true; };
  std::vector<std::shared_ptr<Copy>> open, committed;
  std::vector<std::pair<size_t, u32>> stored;
  bool ended = false;
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::shared_ptr<Copy>> copies;
  Meeting meeting;
  ucontext_t scheduler;
  std::mt19937 draw;
  std::string error;
  std::function<void()> body;
};

inline Cluster* cluster;
inline Thread* self;
inline std::vector<std::pair<const char*, const char*>> reachable;  // of global memory

inline Block& block() { return *self->block; }
inline Warp& own_warp() { return block().warps[self->index >> 5]; }
inline int own_lane() { return self->index & 31; }

inline void fail(const std::string& what) {
  if (cluster->error.empty())
    cluster->error = what + " (block " + std::to_string(self->number) + ", thread " +
                     std::to_string(self->index) + ")";
  if (self) swapcontext(&self->context, &cluster->scheduler);
}

inline void until(std::function<bool()> ready) {
  self->ready = std::move(ready);
  swapcontext(&self->context, &cluster->scheduler);
}

inline void meet(Meeting& meeting, int count, const char* at) {
  if (meeting.present == 0) meeting.at = at;
  if (std::strcmp(meeting.at, at)) fail(std::string("threads meet at ") + meeting.at + " and at " + at);
  const unsigned generation = meeting.generation;
  if (++meeting.present == count) {
    meeting.present = 0;
    meeting.generation++;
    return;
  }
  until([&meeting, generation] { return meeting.generation != generation; });
}

inline void __syncwarp() { meet(own_warp().meeting, 32, "__syncwarp"); }
inline void __syncthreads() { meet(block().meeting, 32 * (int)block().warps.size(), "__syncthreads"); }
inline void cluster_meet() { meet(cluster->meeting, (int)cluster->threads.size(), "the cluster's barrier"); }
inline u32 cluster_rank() { return self->rank; }
inline unsigned char* shared_memory() { return block().shared.data(); }

inline size_t offset_of(const void* p, size_t bytes) {
  const size_t offset = (const unsigned char*)p - block().shared.data();
  if (offset + bytes > block().shared.size()) fail("beyond shared memory");
  return offset;
}

// -- numbers ---------------------------------------------------------------------------------------------

inline float bits_to_float(u32 bits) { float f; std::memcpy(&f, &bits, 4); return f; }
inline u32 float_to_bits(float f) { u32 bits; std::memcpy(&bits, &f, 4); return bits; }

template <class Kind>
struct Number {
  static u32 pack(float low, float high) { return Kind::narrow(low) | (u32)Kind::narrow(high) << 16; }
  static float low(u32 both) { return Kind::widen((u16)both); }
  static float high(u32 both) { return Kind::widen((u16)(both >> 16)); }
  static void multiply(float (&total)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Warp& warp = own_warp();
    const int lane = own_lane();
    std::copy(a, a + 4, warp.a[lane]);
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    meet(warp.meeting, 32, "mma");
    for (int i = 0; i < 4; i++) {
      const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
      double sum = total[i];
      for (int k = 0; k < 16; k++) {
        const u32 left = warp.a[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
        const u32 right = warp.b[column * 4 + k % 8 / 2][k / 8];
        sum += (double)(k % 2 ? high(left) : low(left)) * (k % 2 ? high(right) : low(right));
      }
      total[i] = (float)sum;
    }
    meet(warp.meeting, 32, "mma");
  }
};

struct Bfloat16 : Number<Bfloat16> {
  static float widen(u16 bits) { return bits_to_float((u32)bits << 16); }
  static u16 narrow(float f) {
    const u32 bits = float_to_bits(f);
    if (std::isnan(f)) return 0x7fff;
    return (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
};

struct Float16 : Number<Float16> {
  static float widen(u16 bits) { _Float16 f; std::memcpy(&f, &bits, 2); return (float)f; }
  static u16 narrow(float f) { const _Float16 h = (_Float16)f; u16 bits; std::memcpy(&bits, &h, 2); return bits; }
};

inline float rsqrtf(float v) { return 1.f / std::sqrt(v); }
inline float __expf(float v) { return std::exp(v); }

inline void load_matrices(u32 (&out)[4], const void* row) {
  Warp& warp = own_warp();
  const int lane = own_lane();
  if ((uintptr_t)row & 15) fail("ldmatrix from an address that is no multiple of 16 bytes");
  offset_of(row, 16);
  warp.address[lane] = row;
  meet(warp.meeting, 32, "ldmatrix");
  for (int i = 0; i < 4; i++)
    std::memcpy(out + i, (const char*)warp.address[8 * i + lane / 4] + 4 * (lane % 4), 4);
  meet(warp.meeting, 32, "ldmatrix");
}

inline void store_shared(u32* p, u32 value) {
  *p = value;
  self->stored.push_back({offset_of(p, 4), value});
}

inline float shuffled(float value, int mask) {
  Warp& warp = own_warp();
  warp.value[own_lane()] = value;
  meet(warp.meeting, 32, "shfl");
  const float other = warp.value[own_lane() ^ mask];
  meet(warp.meeting, 32, "shfl");
  return other;
}

// -- barriers ----------------------------------------------------------------------------------------------

struct Barrier {
  u16 pending, arrivals;
  int32_t bytes_and_phase;  // bytes still to come, which may be negative for a while, and the phase's parity
};

inline Barrier& barrier_at(u64* p) { return *(Barrier*)p; }

inline void settle(Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes_and_phase >> 1 == 0) {
    barrier.pending = barrier.arrivals;
    barrier.bytes_and_phase ^= 1;
  }
}

inline void arrive(Barrier& barrier) {
  if (barrier.pending == 0) fail("more arrivals than a barrier counts");
  barrier.pending--;
  settle(barrier);
}

inline void barrier_init(u64* p, u32 arrivals) {
  offset_of(p, 8);
  barrier_at(p) = {(u16)arrivals, (u16)arrivals, 0};
}
inline void barriers_ready() {}
inline void barrier_arrive(u64* p) { arrive(barrier_at(p)); }
inline void barrier_expect(u64* p, u32 bytes) {
  barrier_at(p).bytes_and_phase += 2 * (int)bytes;
  arrive(barrier_at(p));
}
inline void barrier_wait(u64* p, u32 parity) {
  Barrier& barrier = barrier_at(p);
  until([&barrier, parity] { return (barrier.bytes_and_phase & 1) != (int)parity; });
}
inline void barrier_wait_cluster(u64* p, u32 parity) { barrier_wait(p, parity); }

inline Block& other_block(u32 rank) {
  if (rank >= cluster->blocks.size()) fail("no such block in the cluster");
  return *cluster->blocks[rank];
}
inline void must_run(const Block& there) {
  if (!there.running) cluster->error = "a block was reached after it had ended";
}
inline void barrier_arrive_at(u64* p, u32 rank) {
  Block& there = other_block(rank);
  must_run(there);
  arrive(*(Barrier*)(there.shared.data() + offset_of(p, 8)));
}

// -- bulk copies -------------------------------------------------------------------------------------------

inline void check_copy(const void* inside, const void* global, u32 bytes) {
  if ((offset_of(inside, bytes) | (uintptr_t)global | bytes) & 15)
    fail("a bulk copy of addresses or bytes that are no multiple of 16");
  for (const auto& range : reachable)
    if (range.first <= (const char*)global && (const char*)global + bytes <= range.second) return;
  fail("a bulk copy beyond the tensors");
}

inline void copy_in_all(void* to, const void* from, u32 bytes, u64* barrier, u16 mask) {
  check_copy(to, from, bytes);
  const size_t place = offset_of(to, bytes), announced = offset_of(barrier, 8);
  for (u32 rank = 0; rank < 16; rank++) {
    if (!(mask >> rank & 1)) continue;
    Block* there = &other_block(rank);
    auto copy = std::make_shared<Copy>();
    copy->write = [=] {
      must_run(*there);
      std::memcpy(there->shared.data() + place, from, bytes);
      std::memcpy(there->copied.data() + place, from, bytes);
      Barrier& known = *(Barrier*)(there->shared.data() + announced);
      known.bytes_and_phase -= 2 * (int)bytes;
      settle(known);
    };
    cluster->copies.push_back(copy);
  }
}
inline void copy_in(void* to, const void* from, u32 bytes, u64* barrier) {
  copy_in_all(to, from, bytes, barrier, (u16)(1 << self->rank));
}

inline void copy_out(void* to, const void* from, u32 bytes) {
  check_copy(from, to, bytes);
  Block* here = self->block;
  const size_t place = offset_of(from, bytes);
  auto read = std::make_shared<std::vector<unsigned char>>();
  auto copy = std::make_shared<Copy>();
  copy->read = [=] { read->assign(here->copied.begin() + place, here->copied.begin() + place + bytes); };
  copy->write = [=] { std::memcpy(to, read->data(), bytes); };
  cluster->copies.push_back(copy);
  self->open.push_back(copy);
}
inline void copies_commit() {
  self->committed.insert(self->committed.end(), self->open.begin(), self->open.end());
  self->open.clear();
}
inline void copies_wait_read() {
  Thread* mine = self;
  until([mine] {
    return std::all_of(mine->committed.begin(), mine->committed.end(), [](auto& c) { return c->has_read; });
  });
}
inline void copies_wait() {
  Thread* mine = self;
  until([mine] {
    return std::all_of(mine->committed.begin(), mine->committed.end(), [](auto& c) { return c->done; });
  });
}
inline void copies_fence() {
  for (const auto& store : self->stored) std::memcpy(block().copied.data() + store.first, &store.second, 4);
  self->stored.clear();
}

// -- running -----------------------------------------------------------------------------------------------

inline void step_of_a_copy() {
  const size_t drawn = cluster->draw() % cluster->copies.size();
  auto copy = cluster->copies[drawn];
  if (copy->read && !copy->has_read) {
    copy->read();
    copy->has_read = true;
    return;
  }
  copy->write();
  copy->has_read = copy->done = true;
  cluster->copies.erase(cluster->copies.begin() + drawn);
}

inline void thread_body() {
  cluster->body();
  self->ended = true;
  self->block->running--;
  for (const auto& copy : self->committed)
    if (!copy->done) fail("a thread ended before its copies");
  if (!self->open.empty()) fail("a copy out was not committed");
  swapcontext(&self->context, &cluster->scheduler);
}

inline bool step_of_a_thread() {
  const size_t count = cluster->threads.size(), begin = cluster->draw() % count;
  for (size_t i = 0; i < count; i++) {
    Thread& thread = *cluster->threads[(begin + i) % count];
    if (thread.ended || !thread.ready()) continue;
    self = &thread;
    threadIdx.x = thread.index;
    blockIdx.x = thread.number;
    swapcontext(&cluster->scheduler, &thread.context);
    return true;
  }
  return false;
}

inline std::string run_cluster(int first, int size, int threads, size_t bytes, u32 seed, std::function<void()> body) {
  Cluster whole;
  cluster = &whole;
  whole.draw.seed(seed);
  whole.body = std::move(body);
  for (int rank = 0; rank < size; rank++) {
    whole.blocks.push_back(std::make_unique<Block>());
    Block& here = *whole.blocks.back();
    here.shared.assign(bytes, 0xff);
    here.copied.assign(bytes, 0xff);
    here.warps.resize(threads / 32);
    here.running = threads;
    for (int index = 0; index < threads; index++) {
      whole.threads.push_back(std::make_unique<Thread>());
      Thread& thread = *whole.threads.back();
      const size_t stack = 1 << 16;
      thread.stack.reset(new char[stack]);
      thread.block = &here;
      thread.index = index;
      thread.number = first + rank;
      thread.rank = rank;
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = stack;
      makecontext(&thread.context, thread_body, 0);
    }
  }
  const u32 hurry = 1 + seed % 7;  // how often a copy makes a step while threads could
  while (whole.error.empty()) {
    if (!whole.copies.empty() && whole.draw() % (8 * hurry) == 0) step_of_a_copy();
    if (step_of_a_thread()) continue;
    if (!whole.copies.empty()) step_of_a_copy();
    else break;
  }
  for (const auto& thread : whole.threads)
    if (whole.error.empty() && !thread->ended)
      whole.error = "deadlock: block " + std::to_string(thread->number) + ", thread " +
                    std::to_string(thread->index) + " waits for ever";
  return whole.error;
}

template <class Kernel, class Arguments>
std::string run_grid(Kernel kernel, const Arguments& arguments, int blocks, int size, int threads, size_t bytes, u32 seed) {
  gridDim.x = blocks;
  for (int first = 0; first < blocks; first += size) {
    std::string error = run_cluster(first, size, threads, bytes, seed + first, [&] { kernel(arguments); });
    if (!error.empty()) return error;
  }
  return "";
}
