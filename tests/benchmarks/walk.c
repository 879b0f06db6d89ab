#define _GNU_SOURCE
/* Reads a subtree in windows of pipelined requests, READ, DIRECTORY and GET_PERMS of each node, and prints how
   many nodes and bytes it has read: walk SOCKET NODE.  Built and run by subtree.py. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { WINDOW = 128, DIRECTORY = 1, READ = 2, GET_PERMS = 3, LONGEST = 16 << 20 };
static const uint32_t OPS[] = { READ, DIRECTORY, GET_PERMS };

int main(int argc, char **argv)
{
    static char requests[3 * WINDOW * 4096];
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    char **paths = malloc(sizeof(char *) << 22), *payload = malloc(LONGEST);
    size_t known = 1, read_nodes = 0, bytes = 0;
    int connection = socket(AF_UNIX, SOCK_STREAM, 0);
    FILE *replies = fdopen(connection, "r");

    if (argc != 3)
        return 1;
    strncpy(address.sun_path, argv[1], sizeof(address.sun_path) - 1);
    if (connect(connection, (struct sockaddr *)&address, sizeof(address)) != 0)
        return 1;
    setvbuf(replies, NULL, _IOFBF, 1 << 18);
    for (paths[0] = argv[2]; read_nodes < known;) {
        size_t end = known - read_nodes > WINDOW ? read_nodes + WINDOW : known, length = 0;

        for (size_t node = read_nodes; node < end; node++)
            for (int i = 0; i < 3; i++) {
                uint32_t size = strlen(paths[node]) + 1, header[] = { OPS[i], 0, 0, size };
                memcpy(requests + length, header, 16);
                memcpy(requests + length + 16, paths[node], size);
                length += 16 + size;
            }
        for (size_t sent = 0; sent < length;) {
            ssize_t done = write(connection, requests + sent, length - sent);
            if (done < 0)
                return 1;
            sent += done;
        }
        for (; read_nodes < end; read_nodes++)
            for (int i = 0; i < 3; i++) {
                uint32_t header[4];
                if (fread(header, 16, 1, replies) != 1 || header[3] > LONGEST
                    || fread(payload, 1, header[3], replies) != header[3])
                    return 1;
                bytes += header[3];
                for (char *name = payload; header[0] == DIRECTORY && name < payload + header[3];
                     name += strlen(name) + 1)
                    if (asprintf(&paths[known++], "%s/%s", paths[read_nodes], name) < 0)
                        return 1;
            }
    }
    printf("%zu nodes, %zu bytes\n", read_nodes, bytes);
    return 0;
}
