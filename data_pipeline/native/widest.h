/* What every file of kernels shares. */
#ifndef JOY_WIDEST_H
#define JOY_WIDEST_H

/* One binary for all x86-64: the loader takes the widest version that the processor has. */
#if defined(__GLIBC__) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDEST __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDEST
#endif

#endif
