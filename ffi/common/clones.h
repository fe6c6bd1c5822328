// DSV4_CLONES before a function: compiled for several instruction sets, chosen when the library is
// loaded. Nothing in it may be contracted or reordered, so that the results are the same.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define DSV4_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DSV4_CLONES
#endif
