// load: the bench's load generator, one epoll loop a process.
//
//   load server ADDR PORT                      serves every kind of client below but pgidle
//   load down|up ADDR PORT CONNECTIONS BYTES   each connection moves BYTES, one way
//   load connect ADDR PORT CONNECTIONS SECONDS connect, 100 bytes there and back, close, again
//   load pingpong ADDR PORT CONNECTIONS SECONDS  100 bytes there and back, again, on connections that stay
//   load idle ADDR PORT CONNECTIONS            one round trip each, then holds them until stdin ends
//   load pgidle ADDR PORT CONNECTIONS          the same with PostgreSQL: login as "postgres" and one query
//
// A client starts with a 16-byte header: mode (1), 7 zero bytes, total bytes (u64 LE). Bulk bytes are
// a fixed pattern: byte i of a stream is PATTERN[i % sizeof PATTERN], so that a capture can be checked.
// Clients print one JSON line.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 256 * 1024, HEADER = 16, SMALL = 100, BATCH = 256 };

struct connection {
  int fd;
  int listening;
  char mode;
  int header_bytes;
  char header[HEADER];
  uint64_t total, done;
  int acknowledged;
  uint64_t started;
};

static char pattern[PIECE];
static char scratch[PIECE];
static int poller;
static struct sockaddr_in target;

static uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void die(const char *what) {
  perror(what);
  exit(1);
}

static void prepare(int fd) {
  int on = 1;
  fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
}

static void watch(struct connection *c, int operation, uint32_t events) {
  struct epoll_event e = {.events = events, .data.ptr = c};
  if (epoll_ctl(poller, operation, c->fd, &e)) die("epoll_ctl");
}

// Returns 1 when the connection has sent its total, 0 when it would block, -1 when it is broken.
static int send_pattern(struct connection *c) {
  while (c->done < c->total) {
    uint64_t at = c->done % PIECE, want = PIECE - at;
    if (want > c->total - c->done) want = c->total - c->done;
    ssize_t n = send(c->fd, pattern + at, want, MSG_NOSIGNAL);
    if (n < 0) return errno == EAGAIN ? 0 : -1;
    c->done += (uint64_t)n;
  }
  return 1;
}

static void end(struct connection *c) {
  close(c->fd);
  free(c);
}

static void accept_all(struct connection *listener) {
  for (int i = 0; i < 64; i++) {
    int fd = accept4(listener->fd, NULL, NULL, SOCK_NONBLOCK);
    if (fd < 0) return;
    prepare(fd);
    struct connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    watch(c, EPOLL_CTL_ADD, EPOLLIN);
  }
}

// Reads the client's header; returns 1 when it is whole, 0 to wait, -1 when the client is gone.
static int read_header(struct connection *c) {
  ssize_t n = read(c->fd, c->header + c->header_bytes, (size_t)(HEADER - c->header_bytes));
  if (n <= 0) return n < 0 && errno == EAGAIN ? 0 : -1;
  c->header_bytes += (int)n;
  if (c->header_bytes < HEADER) return 0;
  c->mode = c->header[0];
  memcpy(&c->total, c->header + 8, 8);
  return 1;
}

static int serve_bytes(struct connection *c) {
  ssize_t n = read(c->fd, scratch, sizeof scratch);
  if (n <= 0) return n < 0 && errno == EAGAIN ? 0 : -1;
  if (c->mode != 'u') return send(c->fd, scratch, (size_t)n, MSG_NOSIGNAL) == n ? 0 : -1;
  c->done += (uint64_t)n;
  if (c->done < c->total || c->acknowledged) return 0;
  c->acknowledged = 1;
  return send(c->fd, &c->done, 8, MSG_NOSIGNAL) == 8 ? 0 : -1;
}

static void serve(struct connection *c) {
  if (c->header_bytes < HEADER) {
    int whole = read_header(c);
    if (whole < 0) return end(c);
    if (!whole) return;
    if (c->mode == 'd') watch(c, EPOLL_CTL_MOD, EPOLLOUT);
  }
  if (c->mode == 'd' && c->done < c->total) {
    int sent = send_pattern(c);
    if (sent < 0) return end(c);
    if (sent) watch(c, EPOLL_CTL_MOD, EPOLLIN);
    return;
  }
  if (serve_bytes(c) < 0) end(c);
}

static _Noreturn void server(const char *port) {
  struct connection listener = {.listening = 1};
  int on = 1;
  listener.fd = socket(AF_INET, SOCK_STREAM, 0);
  setsockopt(listener.fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
  if (bind(listener.fd, (void *)&target, sizeof target)) die(port);
  if (listen(listener.fd, 4096)) die("listen");
  fcntl(listener.fd, F_SETFL, O_NONBLOCK);
  watch(&listener, EPOLL_CTL_ADD, EPOLLIN);
  struct epoll_event ready[BATCH];
  for (;;) {
    int n = epoll_wait(poller, ready, BATCH, -1);
    for (int i = 0; i < n; i++) {
      struct connection *c = ready[i].data.ptr;
      if (c->listening)
        accept_all(c);
      else
        serve(c);
    }
  }
}

static int dial(void) {
  for (int attempt = 0; attempt < 20; attempt++) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0) die("socket");
    if (!connect(fd, (void *)&target, sizeof target)) return fd;
    close(fd);
    usleep(20000);
  }
  die("connect");
  return -1;
}

static void say(int fd, char mode, uint64_t total, size_t body) {
  char message[HEADER + SMALL] = {mode};
  memcpy(message + 8, &total, 8);
  memcpy(message + HEADER, pattern, SMALL);
  if (send(fd, message, HEADER + body, MSG_NOSIGNAL) != (ssize_t)(HEADER + body)) die("send");
}

// One bulk client's turn; returns 1 when it has finished.
static int move_bulk(struct connection *c, uint32_t events) {
  if (c->mode == 'd') {
    ssize_t n = read(c->fd, scratch, sizeof scratch);
    if (n == 0 || (n < 0 && errno != EAGAIN)) die("bulk: early end");
    if (n > 0) c->done += (uint64_t)n;
    return c->done >= c->total;
  }
  if (events & EPOLLOUT && c->done < c->total) {
    int sent = send_pattern(c);
    if (sent < 0) die("bulk: send");
    if (sent) watch(c, EPOLL_CTL_MOD, EPOLLIN);
  }
  char answer[8];
  return events & EPOLLIN && read(c->fd, answer, sizeof answer) > 0;
}

static int bulk(char mode, int connections, uint64_t bytes) {
  struct connection *all = calloc((size_t)connections, sizeof *all);
  for (int i = 0; i < connections; i++) {
    all[i].fd = dial();
    all[i].mode = mode;
    all[i].total = bytes;
    prepare(all[i].fd);
  }
  uint64_t started = now_ns();
  for (int i = 0; i < connections; i++) {
    say(all[i].fd, mode, bytes, 0);
    watch(&all[i], EPOLL_CTL_ADD, mode == 'd' ? EPOLLIN : EPOLLIN | EPOLLOUT);
  }
  struct epoll_event ready[BATCH];
  for (int left = connections; left > 0;) {
    int n = epoll_wait(poller, ready, BATCH, 60000);
    if (n <= 0) die("bulk: no progress in 60 s");
    for (int i = 0; i < n; i++) {
      struct connection *c = ready[i].data.ptr;
      if (!move_bulk(c, ready[i].events)) continue;
      close(c->fd);
      left--;
    }
  }
  double seconds = (double)(now_ns() - started) / 1e9;
  printf("{\"bytes\":%.0f,\"seconds\":%.4f}\n", (double)bytes * connections, seconds);
  return 0;
}

static void start_round(struct connection *c) {
  c->started = now_ns();
  c->fd = dial();
  c->done = 0;
  say(c->fd, 'p', 0, SMALL);
  prepare(c->fd);
  watch(c, EPOLL_CTL_ADD, EPOLLIN);
}

static int compare(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return (x > y) - (x < y);
}

// Round trips of SMALL bytes for `seconds`: each on a connection of its own, or all on those that stay.
static int trips(int connections, double seconds, int stay) {
  size_t room = 4000000, count = 0;
  uint32_t *latency_us = malloc(room * sizeof *latency_us);
  struct connection *all = calloc((size_t)connections, sizeof *all);
  uint64_t started = now_ns(), until = started + (uint64_t)(seconds * 1e9);
  for (int i = 0; i < connections; i++) start_round(&all[i]);
  struct epoll_event ready[BATCH];
  for (;;) {
    int n = epoll_wait(poller, ready, BATCH, 10000);
    if (n <= 0) die("no progress in 10 s");
    uint64_t t = now_ns();
    if (t > until) break;
    for (int i = 0; i < n; i++) {
      struct connection *c = ready[i].data.ptr;
      ssize_t got = read(c->fd, scratch, SMALL);
      if (got <= 0) die("early end");
      c->done += (uint64_t)got;
      if (c->done < SMALL) continue;
      if (count < room) latency_us[count++] = (uint32_t)((now_ns() - c->started) / 1000);
      if (stay) {
        c->started = now_ns();
        c->done = 0;
        if (send(c->fd, pattern, SMALL, MSG_NOSIGNAL) != SMALL) die("send");
        continue;
      }
      close(c->fd);
      start_round(c);
    }
  }
  double took = (double)(now_ns() - started) / 1e9;
  qsort(latency_us, count, sizeof *latency_us, compare);
  printf("{\"trips\":%zu,\"seconds\":%.3f,\"p50_us\":%u,\"p99_us\":%u}\n", count, took,
         count ? latency_us[count / 2] : 0, count ? latency_us[count * 99 / 100] : 0);
  return 0;
}

static void one_trip(int fd) {
  say(fd, 'p', 0, SMALL);
  for (ssize_t got = 0; got < SMALL;) {
    ssize_t n = read(fd, scratch, (size_t)(SMALL - got));
    if (n <= 0) die("idle: read");
    got += n;
  }
}

// Reads PostgreSQL messages up to and with ReadyForQuery, which is the last one that comes.
static void until_ready(int fd) {
  size_t have = 0;
  for (;;) {
    ssize_t n = read(fd, scratch + have, sizeof scratch - have);
    if (n <= 0) die("pgidle: read");
    have += (size_t)n;
    if (scratch[0] == 'E') {
      fprintf(stderr, "pgidle: the server answered an error\n");
      exit(1);
    }
    if (have >= 6 && !memcmp(scratch + have - 6, "Z\0\0\0\5", 5)) return;
  }
}

static void one_login(int fd) {
  static const char startup[] = "\0\0\0\51\0\3\0\0user\0postgres\0database\0postgres\0";
  static const char query[] = "Q\0\0\0\15SELECT 1";
  if (send(fd, startup, sizeof startup, MSG_NOSIGNAL) != sizeof startup) die("pgidle: send");
  until_ready(fd);
  if (send(fd, query, sizeof query, MSG_NOSIGNAL) != sizeof query) die("pgidle: send");
  until_ready(fd);
}

static int idle(int connections, void (*begin)(int)) {
  for (int i = 0; i < connections; i++) begin(dial());
  printf("{\"open\":%d}\n", connections);
  fflush(stdout);
  while (read(0, scratch, sizeof scratch) > 0) continue;
  return 0;
}

int main(int count, char **words) {
  if (count < 4) return fprintf(stderr, "usage: see the head of load.c\n"), 2;
  struct rlimit files;
  getrlimit(RLIMIT_NOFILE, &files);
  files.rlim_cur = files.rlim_max;
  setrlimit(RLIMIT_NOFILE, &files);
  uint32_t x = 1;
  for (int i = 0; i < PIECE; i++) {
    x = x * 1103515245u + 12345u;
    pattern[i] = "abcdefgh01234567"[(x >> 16) & 15];
  }
  target.sin_family = AF_INET;
  target.sin_port = htons((uint16_t)atoi(words[3]));
  if (inet_pton(AF_INET, words[2], &target.sin_addr) != 1) die("address");
  poller = epoll_create1(0);
  if (!strcmp(words[1], "server")) server(words[3]);
  if (count < 5) return 2;
  int connections = atoi(words[4]);
  if (!strcmp(words[1], "idle")) return idle(connections, one_trip);
  if (!strcmp(words[1], "pgidle")) return idle(connections, one_login);
  if (count < 6) return 2;
  if (!strcmp(words[1], "connect")) return trips(connections, atof(words[5]), 0);
  if (!strcmp(words[1], "pingpong")) return trips(connections, atof(words[5]), 1);
  return bulk(words[1][0], connections, strtoull(words[5], NULL, 10));
}
