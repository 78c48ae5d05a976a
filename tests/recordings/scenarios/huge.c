/* huge NODE COUNT TOUCH [SIZE_SHIFT]: map COUNT huge pages bound to NODE (-1: no policy), touch the first TOUCH of
 * them, stay alive; SIGUSR1: check each touched page's token; SIGUSR2: touch one page more.
 * Used inside the recorded guest; build: gcc -O2 -static -o huge huge.c */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
static char *p; static unsigned long touched, size; static volatile sig_atomic_t check, more;
static void usr1(int s) { (void)s; check = 1; }
static void usr2(int s) { (void)s; more = 1; }
static void touch(void) { *(volatile unsigned long *)(p + touched * size) = touched * 0x9e3779b97f4a7c15ul + 1; touched++; }
int main(int c, char **v) {
    int node = atoi(v[1]), shift = c > 4 ? atoi(v[4]) : 21;
    unsigned long n = strtoul(v[2], 0, 0), want = strtoul(v[3], 0, 0), mask = node < 0 ? 0 : 1ul << node;
    size = 1ul << shift;
    p = mmap(0, n * size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (shift << MAP_HUGE_SHIFT), -1, 0);
    if (p == MAP_FAILED) { perror("mmap"); return 1; }
    if (node >= 0 && syscall(SYS_mbind, p, n * size, 2, &mask, 64ul, 0)) { perror("mbind"); return 1; }
    while (touched < want) touch();
    signal(SIGUSR1, usr1); signal(SIGUSR2, usr2);
    printf("huge ready\n"); fflush(stdout);
    for (;;) {
        pause();
        if (more) { more = 0; touch(); }
        if (check) { unsigned long i, bad = 0; check = 0;
            for (i = 0; i < touched; i++) bad += *(unsigned long *)(p + i * size) != i * 0x9e3779b97f4a7c15ul + 1;
            printf("huge tokens wrong: %lu of %lu\n", bad, touched); fflush(stdout); }
    }
}
