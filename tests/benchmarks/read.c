/* Reads a node as often as each line of stdin says, and answers each line with the value that it
   read last: read NODE.  Built and run by libxenstore.py. */

#include <stdio.h>
#include <stdlib.h>
#include <xenstore.h>

int main(int argc, char **argv)
{
    struct xs_handle *store = argc == 2 ? xs_open(0) : NULL;
    char line[32];

    if (store == NULL)
        return 1;
    while (fgets(line, sizeof(line), stdin) != NULL) {
        for (int left = atoi(line); left > 0; left--) {
            unsigned int length;
            char *value = xs_read(store, XBT_NULL, argv[1], &length);
            if (value == NULL)
                return 1;
            if (left == 1 && (fwrite(value, 1, length, stdout) != length || putchar('\n') == EOF))
                return 1;
            free(value);
        }
        fflush(stdout);
    }
    xs_close(store);
    return 0;
}
