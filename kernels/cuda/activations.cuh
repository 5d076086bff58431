// Activations of the bottleneck in float32, by the numbers of kernels/settings.py. Each lets NaN through.

DEVICE float sigmoid(float u) { return 1.f / (1.f + __expf(-u)); }

template <int ACTIVATION>
DEVICE float activate(float u) {
  if (ACTIVATION == 1) return u < 0.f ? 0.f : u;  // fmaxf would make zero of a NaN
  if (ACTIVATION == 2) return 0.5f * u * (1.f + erff(u * 0.70710678f));
  if (ACTIVATION == 3) return u * sigmoid(1.5957691216f * (u + 0.044715f * u * u * u));
  if (ACTIVATION == 4) return u * sigmoid(u);
  if (ACTIVATION == 5) return u * sigmoid(1.702f * u);
  if (ACTIVATION == 6) return tanhf(u);
  return u;
}
