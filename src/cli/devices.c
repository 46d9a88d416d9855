/* clmoe devices: the OpenCL devices, and the engines that would run on each. */
#include "device_list.h"

#include <jansson.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char usage[] =
    "Usage: clmoe devices [--json] [--no-cache]\n"
    "Lists the OpenCL devices: index (for --device), platform, device, driver, memory and\n"
    "the engines that would run there. An asterisk marks the default device.\n"
    "\n"
    "Options:\n"
    "  --json      prints one JSON array\n"
    "  --no-cache  compiles anew: no program is read from or written to the user's cache\n"
    "  --help      this text\n"
    "  --version   the version\n";

#define TEXT_SIZE 256

typedef struct device_facts {
    char platform[TEXT_SIZE], name[TEXT_SIZE], driver[TEXT_SIZE], version[TEXT_SIZE];
    cl_ulong global_memory, local_memory;
    cl_uint compute_units;
    json_t *engines;         /* names */
    char problem[TEXT_SIZE]; /* why no engine would run; else empty */
} device_facts;

static clmoe_status engines_get(const device_entry *entry, bool no_cache, json_t *names) {
    clmoe_status status = CLMOE_SUCCESS;
    clmoe_context *context = NULL;
    clmoe_context_options options;
    char cache_path[CACHE_PATH_SIZE];
    cl_int code;
    cl_context cl = clCreateContext(NULL, 1, &entry->device, NULL, NULL, &code);
    TRY(cli_cl(code, "clCreateContext"));
    clmoe_context_options_init(&options);
    if (!no_cache)
        options.cache_dir = user_cache_dir(entry->platform, cache_path);
    TRY(LIB(clmoe_context_create(cl, entry->device, &options, &context)));
    uint32_t supported = 0;
    const char *name = NULL;
    for (uint32_t i = 0; (name = clmoe_engine_name(context, i, &supported)) != NULL; i++)
        if (supported)
            json_array_append_new(names, json_string(name));
done:
    clmoe_context_destroy(context);
    if (cl != NULL)
        clReleaseContext(cl);
    return status;
}

static void facts_get(const device_entry *entry, bool no_cache, device_facts *facts) {
    cl_device_id device = entry->device;
    *facts = (device_facts){.engines = json_array()};
    platform_text(entry->platform, CL_PLATFORM_NAME, facts->platform, TEXT_SIZE);
    device_text(device, CL_DEVICE_NAME, facts->name, TEXT_SIZE);
    device_text(device, CL_DRIVER_VERSION, facts->driver, TEXT_SIZE);
    device_text(device, CL_DEVICE_VERSION, facts->version, TEXT_SIZE);
    clGetDeviceInfo(device, CL_DEVICE_GLOBAL_MEM_SIZE, sizeof(cl_ulong), &facts->global_memory,
                    NULL);
    clGetDeviceInfo(device, CL_DEVICE_LOCAL_MEM_SIZE, sizeof(cl_ulong), &facts->local_memory, NULL);
    clGetDeviceInfo(device, CL_DEVICE_MAX_COMPUTE_UNITS, sizeof(cl_uint), &facts->compute_units,
                    NULL);
    if (engines_get(entry, no_cache, facts->engines) != CLMOE_SUCCESS)
        snprintf(facts->problem, TEXT_SIZE, "%.*s", TEXT_SIZE - 1, cli_error());
}

static void print_text(const device_list *list, uint32_t index, const device_facts *facts) {
    printf("%c%u  %s (%s)\n", index == list->preferred ? '*' : ' ', (unsigned)index, facts->name,
           device_type_name(list->entries[index].type));
    printf("    platform  %s\n", facts->platform);
    printf("    driver    %s, %s\n", facts->driver, facts->version);
    printf("    memory    %.1f GiB global, %.0f KiB local, %u compute units\n",
           (double)facts->global_memory / (1024.0 * 1024 * 1024),
           (double)facts->local_memory / 1024, (unsigned)facts->compute_units);
    printf("    engines  ");
    for (size_t i = 0; i < json_array_size(facts->engines); i++)
        printf(" %s", json_string_value(json_array_get(facts->engines, i)));
    printf("%s%s\n", facts->problem[0] ? " none: " : "", facts->problem);
}

static json_t *facts_json(const device_list *list, uint32_t index, const device_facts *facts) {
    json_t *object =
        json_pack("{sI sb ss ss ss ss ss sI sI sI sO}", "index", (json_int_t)index, "default",
                  index == list->preferred, "platform", facts->platform, "device", facts->name,
                  "type", device_type_name(list->entries[index].type), "driver", facts->driver,
                  "version", facts->version, "memory", (json_int_t)facts->global_memory,
                  "local_memory", (json_int_t)facts->local_memory, "compute_units",
                  (json_int_t)facts->compute_units, "engines", facts->engines);
    if (facts->problem[0] != '\0')
        json_object_set_new(object, "problem", json_string(facts->problem));
    return object;
}

static clmoe_status list_devices(bool as_json, bool no_cache) {
    clmoe_status status = CLMOE_SUCCESS;
    device_list list;
    json_t *array = json_array();
    TRY(device_list_get(&list));
    for (uint32_t i = 0; i < list.count; i++) {
        device_facts facts;
        facts_get(&list.entries[i], no_cache, &facts);
        if (as_json)
            json_array_append_new(array, facts_json(&list, i, &facts));
        else
            print_text(&list, i, &facts);
        json_decref(facts.engines);
    }
    if (as_json) {
        json_dumpf(array, stdout, JSON_INDENT(2) | JSON_ENSURE_ASCII);
        putchar('\n');
    }
done:
    device_list_free(&list);
    json_decref(array);
    return status;
}

int devices_main(int argc, char **argv) {
    enum { OPT_JSON, OPT_NO_CACHE };
    static const cli_option table[] = {
        [OPT_JSON] = {.name = "json"}, [OPT_NO_CACHE] = {.name = "no-cache"}};
    cli_parser parser = {.options = table, .count = sizeof table / sizeof table[0]};
    bool stop = false;
    clmoe_status status = parse_command(&parser, argc, argv, NULL, usage, &stop);
    if (status == CLMOE_SUCCESS && !stop)
        status = list_devices(parser.given[OPT_JSON] > 0, parser.given[OPT_NO_CACHE] > 0);
    return status == CLMOE_SUCCESS ? EXIT_OK : exit_with_error("devices");
}
