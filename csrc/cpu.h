// Compiled for every x86-64 processor at once, where the compiler can: the program chooses when it starts.
#pragma once

#ifdef EVERY_CPU  // tests/sanitize.sh wants none
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && defined(__linux__)
#define CLONES
#define EVERY_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define EVERY_CPU
#endif
#define INLINE inline __attribute__((always_inline))  // into every clone
#define INLINE_LAMBDA __attribute__((always_inline))
