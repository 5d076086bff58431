// y = residual + gain·(act(LN(x)·downᵀ)·upᵀ + bias) in one launch, for a cluster of thread blocks.
//
// A warp has 16 rows from their arrival to their departure: they come into shared memory by bulk
// copies, both products are taken from there, y takes the place of x and leaves by bulk copies. u's
// fragments become h's in registers. One more warp streams the weights, in chunks of 64 channels,
// through a ring of stages; each block of a cluster loads its share of a chunk and sends it to all, so
// that the cache is read once for CLUSTER tiles. Blocks stay, and take tiles until none is left.
//
// `down` comes as (CHANNELS / 64, WIDTH, 72) and `up` as (CHANNELS / 64, 64, WIDTH + 8), the norm's
// weight in `down`: what pads a row puts its neighbours into other banks, and is never read.

struct Arguments {
  const u16* x;         // (rows, CHANNELS), stride_x apart
  const u16* residual;  // the same, stride_residual apart
  const u16* down;
  const u16* up;
  const float* slope;  // (width,) sums of down's rows; with a norm
  const float* shift;  // (width,) or null
  const float* bias;   // (CHANNELS,) or null
  const float* gain;   // () or null
  u16* y;              // (rows, CHANNELS)
  float* statistics;   // (rows, 2): mean and 1 / deviation; with a norm
  long long stride_x, stride_residual;
  float factor, eps;
  int rows, width;  // units beyond `width` fill up WIDTH
};

enum Residual { NONE, SAME, OTHER };

// where the ring of stages is: the stage, and the parity of its barriers' phases
struct Turn {
  u32 stage, parity;
};

// of a lane's two rows
struct Moments {
  float mean[2], rstd[2];
};

template <typename Number, int CHANNELS, int WIDTH, int WARPS, int BUFFERS, int STAGES, bool NORM,
          int ACTIVATION, int RESIDUAL, int CLUSTER>
struct Forward {
  static_assert(CHANNELS % 64 == 0 && WIDTH % 16 == 0, "chunks and fragments are whole");
  static_assert(CLUSTER == 1 || CLUSTER == 2 || CLUSTER == 4, "shares are multiples of 16 bytes");
  static constexpr int ROWS = 16 * WARPS, CHUNK = 64, CHUNKS = CHANNELS / CHUNK;
  static constexpr int PITCH_X = CHANNELS + 8, PITCH_DOWN = CHUNK + 8, PITCH_UP = WIDTH + 8;
  static constexpr int DOWN = WIDTH * PITCH_DOWN, UP = CHUNK * PITCH_UP;
  static constexpr int STAGE = DOWN > UP ? DOWN : UP;
  static constexpr int BARRIERS = 2 * STAGES + BUFFERS * WARPS;
  static constexpr int BYTES = 2 * (BUFFERS * ROWS * PITCH_X + STAGES * STAGE) + 8 * BARRIERS;

  const Arguments& a;
  u16 *tiles, *weights;
  u64 *filled, *emptied, *arrived;  // a stage's, a stage's, a warp's in a buffer
  int warp, lane, tile_count;
  u32 rank;

  DEVICE Forward(const Arguments& arguments, unsigned char* memory) : a(arguments) {
    tiles = (u16*)memory;
    weights = tiles + BUFFERS * ROWS * PITCH_X;
    filled = (u64*)(weights + STAGES * STAGE);
    emptied = filled + STAGES;
    arrived = emptied + STAGES;
    warp = threadIdx.x >> 5;
    lane = threadIdx.x & 31;
    // as many for every block of a cluster, since they share the ring
    tile_count = ((a.rows + ROWS - 1) / ROWS + CLUSTER - 1) / CLUSTER * CLUSTER;
    rank = CLUSTER > 1 ? cluster_rank() : 0;
  }

  DEVICE void meet() {
    if (CLUSTER > 1) cluster_meet();
    else __syncthreads();
  }

  DEVICE void run() {
    if (threadIdx.x == 0) {
      for (int i = 0; i < STAGES; i++) {
        barrier_init(filled + i, 1);
        barrier_init(emptied + i, WARPS * CLUSTER);
      }
      for (int i = 0; i < BUFFERS * WARPS; i++) barrier_init(arrived + i, 1);
      barriers_ready();
    }
    __syncwarp();
    meet();
    if (warp < WARPS) compute();
    else if (lane == 0) stream_weights();
    __syncwarp();
    if (CLUSTER > 1) cluster_meet();  // others may still send to this block, or arrive in it
  }

  // -- the ring of weights ------------------------------------------------------------------------

  DEVICE void advance(Turn& turn) {
    if (++turn.stage == STAGES) turn = {0, turn.parity ^ 1};
  }

  // every chunk of `down`, then every chunk of `up`, once a tile
  DEVICE void stream_weights() {
    Turn turn = {0, 0};
    for (int tile = blockIdx.x; tile < tile_count; tile += gridDim.x) {
      for (int chunk = 0; chunk < 2 * CHUNKS; chunk++, advance(turn)) {
        u64* barrier = filled + turn.stage;
        u16* stage = weights + turn.stage * STAGE;
        if (CLUSTER > 1) barrier_wait_cluster(emptied + turn.stage, turn.parity ^ 1);
        else barrier_wait(emptied + turn.stage, turn.parity ^ 1);
        const bool first = chunk < CHUNKS;
        const int size = first ? DOWN : UP, share = size / CLUSTER;
        const u16* from = first ? a.down + (long long)chunk * DOWN
                                : a.up + (long long)(chunk - CHUNKS) * UP;
        barrier_expect(barrier, 2 * size);
        if (CLUSTER == 1) copy_in(stage, from, 2 * size, barrier);
        else
          copy_in_all(stage + rank * share, from + rank * share, 2 * share, barrier,
                      (u16)((1 << CLUSTER) - 1));
      }
    }
  }

  // this warp has read the stage: tell each block that fills it
  DEVICE void release(Turn& turn) {
    __syncwarp();
    if (CLUSTER == 1) {
      if (lane == 0) barrier_arrive(emptied + turn.stage);
    } else if (lane < CLUSTER) {
      barrier_arrive_at(emptied + turn.stage, lane);
    }
    advance(turn);
  }

  // -- a warp's rows --------------------------------------------------------------------------------

  DEVICE u16* rows_of(int buffer) { return tiles + (buffer * ROWS + warp * 16) * PITCH_X; }
  DEVICE int first_row(int tile) { return tile * ROWS + warp * 16; }

  // this warp's rows of a tile into its place in a buffer; rows that are not there keep what was
  DEVICE void fetch(const u16* from, long long stride, int tile, int buffer) {
    const int first = first_row(tile), count = min(16, a.rows - first);
    u64* barrier = arrived + buffer * WARPS + warp;
    if (lane == 0) {
      if (count > 0) barrier_expect(barrier, count * CHANNELS * 2);
      else barrier_arrive(barrier);
    }
    __syncwarp();
    if (lane < count)
      copy_in(rows_of(buffer) + lane * PITCH_X, from + (first + lane) * stride, CHANNELS * 2, barrier);
  }

  DEVICE void compute() {
    Turn turn = {0, 0};
    if (blockIdx.x < tile_count) fetch(a.x, a.stride_x, blockIdx.x, 0);
    int number = 0;
    for (int tile = blockIdx.x; tile < tile_count; tile += gridDim.x, number++) {
      const int buffer = number % BUFFERS, next = tile + gridDim.x;
      const u32 phase = number / BUFFERS * (RESIDUAL == OTHER ? 2 : 1);
      u16* x = rows_of(buffer);
      barrier_wait(arrived + buffer * WARPS + warp, phase & 1);
      Moments moments = {{0.f, 0.f}, {1.f, 1.f}};
      if (NORM) {
        moments = measured(x);
        keep(moments, first_row(tile));
      }
      // the last tile's y is still leaving the other buffer: by now it should have been read
      if (BUFFERS == 2 && next < tile_count) refill(next, buffer ^ 1);
      float u[WIDTH / 8][4] = {};
      project_down(u, x, turn);
      if (RESIDUAL == OTHER) {
        __syncwarp();
        fetch(a.residual, a.stride_residual, tile, buffer);
      }
      u32 h[WIDTH / 16][4];
      enter(h, u, moments);
      if (RESIDUAL == OTHER) barrier_wait(arrived + buffer * WARPS + warp, (phase + 1) & 1);
      project_up(x, h, turn);
      copies_fence();
      __syncwarp();
      if (lane < 16 && first_row(tile) + lane < a.rows)
        copy_out(a.y + (long long)(first_row(tile) + lane) * CHANNELS, x + lane * PITCH_X,
                 CHANNELS * 2);
      copies_commit();
      if (BUFFERS == 1 && next < tile_count) refill(next, 0);
    }
    copies_wait();
  }

  DEVICE void refill(int tile, int buffer) {
    copies_wait_read();
    __syncwarp();
    fetch(a.x, a.stride_x, tile, buffer);
  }

  // the address a lane gives for rows 0–15 and columns 0–15, as the first operand of a product
  DEVICE const u16* as_rows(const u16* matrix, int pitch) {
    return matrix + (lane & 15) * pitch + (lane >> 4) * 8;
  }

  // the same for the second operand, which is 16 rows of a transposed matrix
  DEVICE const u16* as_columns(const u16* matrix, int pitch) {
    return matrix + ((lane & 7) + ((lane >> 4) << 3)) * pitch + ((lane >> 3) & 1) * 8;
  }

  // mean and 1 / deviation, exactly: once over the rows for the one, once more for the other
  DEVICE Moments measured(const u16* x) {
    Moments found = {{0.f, 0.f}, {0.f, 0.f}};
    const u16* place = as_rows(x, PITCH_X);
    for (int pass = 0; pass < 2; pass++) {
      float sum[2] = {0.f, 0.f};
      for (int c = 0; c < CHANNELS; c += 16) {
        u32 part[4];
        load_matrices(part, place + c);
#pragma unroll
        for (int i = 0; i < 4; i++) {  // registers 0 and 2 are of the first row
          const float low = Number::low(part[i]) - found.mean[i & 1];
          const float high = Number::high(part[i]) - found.mean[i & 1];
          sum[i & 1] += pass == 0 ? low + high : low * low + high * high;
        }
      }
#pragma unroll
      for (int row = 0; row < 2; row++) {  // four lanes share a row
        float total = sum[row] + shuffled(sum[row], 1);
        total = (total + shuffled(total, 2)) * (1.f / CHANNELS);
        if (pass == 0) found.mean[row] = total;
        else found.rstd[row] = rsqrtf(total + a.eps);
      }
    }
    return found;
  }

  DEVICE void keep(const Moments& moments, int first) {
    for (int half = 0; half < 2; half++) {
      const int row = first + (lane >> 2) + 8 * half;
      if ((lane & 3) == 0 && row < a.rows) {
        a.statistics[2ll * row] = moments.mean[half];
        a.statistics[2ll * row + 1] = moments.rstd[half];
      }
    }
  }

  // u += x·downᵀ
  DEVICE void project_down(float (&u)[WIDTH / 8][4], const u16* x, Turn& turn) {
    const u16* place = as_rows(x, PITCH_X);
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      barrier_wait(filled + turn.stage, turn.parity);
      const u16* stage = as_columns(weights + turn.stage * STAGE, PITCH_DOWN);
#pragma unroll
      for (int k = 0; k < CHUNK; k += 16) {
        u32 part[4];
        load_matrices(part, place + chunk * CHUNK + k);
#pragma unroll
        for (int n = 0; n < WIDTH / 16; n++) {
          u32 w[4];
          load_matrices(w, stage + n * 16 * PITCH_DOWN + k);
          Number::multiply(u[2 * n], part, w[0], w[1]);
          Number::multiply(u[2 * n + 1], part, w[2], w[3]);
        }
      }
      release(turn);
    }
  }

  // h = act(LN's share of u + shift), as the first operand of the next product
  DEVICE void enter(u32 (&h)[WIDTH / 16][4], const float (&u)[WIDTH / 8][4], const Moments& moments) {
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n++) {
      float value[2][2];
#pragma unroll
      for (int odd = 0; odd < 2; odd++) {
        const int unit = 8 * n + 2 * (lane & 3) + odd;
        const bool used = unit < a.width;
        const float slope = NORM && used ? a.slope[unit] : 0.f;
        const float shift = a.shift && used ? a.shift[unit] : 0.f;
#pragma unroll
        for (int row = 0; row < 2; row++) {
          float v = u[n][2 * row + odd];
          if (NORM) v = moments.rstd[row] * (v - moments.mean[row] * slope);
          // an unused unit of an infinite row would be NaN
          value[row][odd] = used ? activate<ACTIVATION>(v + shift) : 0.f;
        }
      }
#pragma unroll
      for (int row = 0; row < 2; row++)
        h[n >> 1][(n & 1) * 2 + row] = Number::pack(value[row][0], value[row][1]);
    }
  }

  // y = residual + gain·(h·upᵀ + bias), where x was
  DEVICE void project_up(u16* x, const u32 (&h)[WIDTH / 16][4], Turn& turn) {
    const float gain = a.gain ? a.factor * *a.gain : a.factor;
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      barrier_wait(filled + turn.stage, turn.parity);
      const u16* stage = as_columns(weights + turn.stage * STAGE, PITCH_UP);
#pragma unroll
      for (int n = 0; n < CHUNK; n += 16) {
        float change[2][4] = {};
#pragma unroll
        for (int k = 0; k < WIDTH / 16; k++) {
          u32 w[4];
          load_matrices(w, stage + n * PITCH_UP + k * 16);
          Number::multiply(change[0], h[k], w[0], w[1]);
          Number::multiply(change[1], h[k], w[2], w[3]);
        }
#pragma unroll
        for (int j = 0; j < 2; j++) {
          const int column = chunk * CHUNK + n + 8 * j + 2 * (lane & 3);
          const float2 bias = a.bias ? *(const float2*)(a.bias + column) : float2{0.f, 0.f};
#pragma unroll
          for (int row = 0; row < 2; row++) {
            u32* place = (u32*)(x + ((lane >> 2) + 8 * row) * PITCH_X + column);
            float low = gain * (change[j][2 * row] + bias.x);
            float high = gain * (change[j][2 * row + 1] + bias.y);
            if (RESIDUAL != NONE) {
              const u32 before = *place;
              low += Number::low(before);
              high += Number::high(before);
            }
            store_shared(place, Number::pack(low, high));
          }
        }
      }
      release(turn);
    }
  }
};

template <typename Number, int CHANNELS, int WIDTH, int WARPS, int BUFFERS, int STAGES, bool NORM,
          int ACTIVATION, int RESIDUAL, int CLUSTER>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(32 * WARPS + 32, 1)
    bottleneck_forward(const __grid_constant__ Arguments arguments) {
  Forward<Number, CHANNELS, WIDTH, WARPS, BUFFERS, STAGES, NORM, ACTIVATION, RESIDUAL, CLUSTER> forward(
      arguments, shared_memory());
  forward.run();
}
