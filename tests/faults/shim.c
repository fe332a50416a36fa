/* Preloaded into a process: fails the Nth write-like call below a directory, or shifts the wall clock.

FAULT_UNDER  directory whose files and entries count
FAULT_AT     number of the call that fails, from 1; it and all later ones where FAULT_STAYS is set
FAULT_ERRNO  what it fails with
FAULT_CLOCK  seconds by which the wall clock jumps, back and forth, at every look at it */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_int calls, looks;
atomic_int fault_fired;

static long setting(const char *name) {
    const char *value = getenv(name);
    return value ? atol(value) : 0;
}

static int is_under(const char *path) {
    const char *home = getenv("FAULT_UNDER");
    return home && path && strncmp(path, home, strlen(home)) == 0;
}

static int fails(const char *path) {
    if (!is_under(path)) return 0;
    int call = ++calls, at = (int)setting("FAULT_AT");
    if (!at || call < at || (call > at && !setting("FAULT_STAYS"))) return 0;
    ++fault_fired;
    errno = (int)setting("FAULT_ERRNO");
    return 1;
}

static int fails_fd(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) { return fails_fd(fd) ? -1 : REAL(write)(fd, data, size); }
int fsync(int fd) { return fails_fd(fd) ? -1 : REAL(fsync)(fd); }
int mkdir(const char *path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return fails(to) ? -1 : REAL(rename)(from, to); }
int symlink(const char *to, const char *path) { return fails(path) ? -1 : REAL(symlink)(to, path); }

static mode_t mode_of(int flags, va_list more) { return flags & O_CREAT ? va_arg(more, mode_t) : 0; }

#define OPEN(name)                                                          \
    int name(const char *path, int flags, ...) {                            \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        mode_t mode = mode_of(flags, more);                                 \
        va_end(more);                                                       \
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && fails(path)) return -1; \
        return REAL(name)(path, flags, mode);                               \
    }
OPEN(open)
OPEN(open64)

int clock_gettime(clockid_t id, struct timespec *now) {
    int done = REAL(clock_gettime)(id, now);
    long step = setting("FAULT_CLOCK");
    if (!done && step && id == CLOCK_REALTIME) now->tv_sec += ++looks % 2 ? step : -step;
    return done;
}

int gettimeofday(struct timeval *now, void *zone) {
    int done = REAL(gettimeofday)(now, zone);
    long step = setting("FAULT_CLOCK");
    if (!done && step) now->tv_sec += ++looks % 2 ? step : -step;
    return done;
}

time_t time(time_t *out) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}
