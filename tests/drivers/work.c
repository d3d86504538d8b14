/* What an application does all day, with libmongoc: `work URI`. Says nothing, and fails where something is not as it should be.
 *
 * `work URI refused` is for a proxy whose rules deny shop.secrets and let shop.rare be asked for once in an age. */

#include <mongoc/mongoc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bson_error_t error;

#define MUST(what)                                                                                        \
   do {                                                                                                   \
      if (!(what)) {                                                                                      \
         fprintf (stderr, "line %d: %s: %u %s\n", __LINE__, #what, error.code, error.message);            \
         exit (1);                                                                                        \
      }                                                                                                   \
   } while (0)

/* How many documents a cursor has. */
static int count (mongoc_cursor_t *cursor)
{
   const bson_t *document;
   int number = 0;
   while (mongoc_cursor_next (cursor, &document))
      number++;
   MUST (!mongoc_cursor_error (cursor, &error));
   mongoc_cursor_destroy (cursor);
   return number;
}

static void work (mongoc_client_t *client)
{
   char name[64];
   bson_oid_t unique;
   bson_oid_init (&unique, NULL);
   strcpy (name, "shop_");
   bson_oid_to_string (&unique, name + 5);
   mongoc_database_t *shop = mongoc_client_get_database (client, name);
   mongoc_collection_t *orders = mongoc_database_get_collection (shop, "orders");
   mongoc_collection_t *large = mongoc_database_get_collection (shop, "large");
   bson_t *all = bson_new ();

   /* Many at once, and many batches. */
   mongoc_bulk_operation_t *bulk = mongoc_collection_create_bulk_operation_with_opts (orders, NULL);
   for (int n = 0; n < 10000; n++) {
      bson_t *order = BCON_NEW ("_id", BCON_INT32 (n), "group", BCON_INT32 (n % 7), "text", "some text that takes some place");
      mongoc_bulk_operation_insert (bulk, order);
      bson_destroy (order);
   }
   MUST (mongoc_bulk_operation_execute (bulk, NULL, &error));
   mongoc_bulk_operation_destroy (bulk);
   bson_t *batches = BCON_NEW ("batchSize", BCON_INT32 (300));
   MUST (count (mongoc_collection_find_with_opts (orders, all, batches, NULL)) == 10000);
   bson_t *group = BCON_NEW ("pipeline", "[", "{", "$group", "{", "_id", "$group", "}", "}", "]");
   MUST (count (mongoc_collection_aggregate (orders, MONGOC_QUERY_NONE, group, NULL, NULL)) == 7);

   /* A cursor that is given up, and a write in between. */
   mongoc_cursor_t *given_up = mongoc_collection_find_with_opts (orders, all, batches, NULL);
   const bson_t *document;
   MUST (mongoc_cursor_next (given_up, &document));
   bson_t *which = BCON_NEW ("group", BCON_INT32 (3)), *change = BCON_NEW ("$inc", "{", "n", BCON_INT32 (1), "}"), reply;
   MUST (mongoc_collection_update_many (orders, which, change, NULL, &reply, &error));
   bson_iter_t field;
   MUST (bson_iter_init_find (&field, &reply, "modifiedCount") && bson_iter_int32 (&field) == 1429);
   bson_destroy (&reply);
   mongoc_cursor_destroy (given_up);
   bson_t *twice = BCON_NEW ("_id", BCON_INT32 (1));
   MUST (!mongoc_collection_insert_one (orders, twice, NULL, NULL, &error) && error.code == 11000);

   /* As large as can be, and as a file. */
   size_t size = 12000000;
   uint8_t *bytes = malloc (size), *back = malloc (size);
   for (size_t n = 0; n < size; n++)
      bytes[n] = (uint8_t) (n * 2654435761u >> 13);
   bson_t *big = bson_new ();
   BSON_APPEND_BINARY (big, "bytes", BSON_SUBTYPE_BINARY, bytes, (uint32_t) size);
   MUST (mongoc_collection_insert_one (large, big, NULL, NULL, &error));
   mongoc_cursor_t *cursor = mongoc_collection_find_with_opts (large, all, NULL, NULL);
   MUST (mongoc_cursor_next (cursor, &document) && bson_iter_init_find (&field, document, "bytes"));
   bson_subtype_t subtype;
   uint32_t length;
   const uint8_t *found;
   bson_iter_binary (&field, &subtype, &length, &found);
   MUST (length == size && memcmp (found, bytes, size) == 0);
   mongoc_cursor_destroy (cursor);
   mongoc_gridfs_bucket_t *files = mongoc_gridfs_bucket_new (shop, NULL, NULL, &error);
   MUST (files);
   bson_value_t file;
   mongoc_stream_t *up = mongoc_gridfs_bucket_open_upload_stream (files, "file", NULL, &file, &error);
   MUST (up && mongoc_stream_write (up, bytes, size, 0) == (ssize_t) size && mongoc_stream_close (up) == 0);
   mongoc_stream_destroy (up);
   mongoc_stream_t *down = mongoc_gridfs_bucket_open_download_stream (files, &file, &error);
   MUST (down && mongoc_stream_read (down, back, size, size, 0) == (ssize_t) size && memcmp (back, bytes, size) == 0);
   mongoc_stream_destroy (down);
   bson_value_destroy (&file);
   mongoc_gridfs_bucket_destroy (files);

   /* Transactions. */
   mongoc_collection_t *one = mongoc_database_get_collection (shop, "one");
   mongoc_client_session_t *session = mongoc_client_start_session (client, NULL, &error);
   MUST (session);
   for (int commits = 0; commits < 2; commits++) {
      bson_t *in = bson_new (), *entry = BCON_NEW ("_id", BCON_INT32 (commits));
      MUST (mongoc_client_session_start_transaction (session, NULL, &error));
      MUST (mongoc_client_session_append (session, in, &error));
      MUST (mongoc_collection_insert_one (one, entry, in, NULL, &error));
      if (commits)
         MUST (mongoc_client_session_commit_transaction (session, NULL, &error));
      else
         MUST (mongoc_client_session_abort_transaction (session, &error));
      bson_destroy (in);
      bson_destroy (entry);
   }
   mongoc_client_session_destroy (session);
   MUST (mongoc_collection_count_documents (one, all, NULL, NULL, NULL, &error) == 1);

   /* What changes. */
   mongoc_change_stream_t *changes = mongoc_collection_watch (one, all, NULL);
   MUST (!mongoc_change_stream_error_document (changes, &error, &document));
   bson_t *entry = BCON_NEW ("_id", BCON_INT32 (7));
   MUST (!mongoc_change_stream_next (changes, &document));
   MUST (mongoc_collection_insert_one (one, entry, NULL, NULL, &error));
   while (!mongoc_change_stream_next (changes, &document))
      MUST (!mongoc_change_stream_error_document (changes, &error, &document));
   MUST (bson_iter_init_find (&field, document, "operationType") && strcmp (bson_iter_utf8 (&field, NULL), "insert") == 0);
   mongoc_change_stream_destroy (changes);

   /* Without an answer: what is asked next has its own. */
   mongoc_write_concern_t *none = mongoc_write_concern_new ();
   mongoc_write_concern_set_w (none, MONGOC_WRITE_CONCERN_W_UNACKNOWLEDGED);
   bson_t *silently = bson_new ();
   mongoc_write_concern_append (none, silently);
   for (int n = 100; n < 200; n++) {
      bson_t *another = BCON_NEW ("_id", BCON_INT32 (n));
      MUST (mongoc_collection_insert_one (one, another, silently, NULL, &error));
      bson_destroy (another);
   }
   while (mongoc_collection_count_documents (one, all, NULL, NULL, NULL, &error) < 102)
      ;
   MUST (mongoc_database_drop (shop, &error));
}

static void refused (mongoc_client_t *client)
{
   bson_t *all = bson_new (), reply;
   mongoc_collection_t *secrets = mongoc_client_get_collection (client, "shop", "secrets");
   mongoc_collection_t *rare = mongoc_client_get_collection (client, "shop", "rare");
   mongoc_collection_t *open = mongoc_client_get_collection (client, "shop", "open");
   for (int turn = 0; turn < 5; turn++) {
      MUST (!mongoc_collection_insert_one (secrets, all, NULL, &reply, &error) && error.code == 13);
      bson_destroy (&reply);
      MUST (mongoc_collection_count_documents (secrets, all, NULL, NULL, NULL, &error) == -1 && error.code == 13);
      /* The connection lives on. */
      MUST (mongoc_collection_count_documents (open, all, NULL, NULL, NULL, &error) == 0);
      int64_t found = mongoc_collection_count_documents (rare, all, NULL, NULL, &reply, &error);
      MUST (turn == 0 ? found == 0 : found == -1 && error.code == 462 && mongoc_error_has_label (&reply, "SystemOverloadedError"));
      bson_destroy (&reply);
      MUST (mongoc_collection_count_documents (open, all, NULL, NULL, NULL, &error) == 0);
   }
}

int main (int arguments, char **argument)
{
   mongoc_init ();
   mongoc_client_t *client = mongoc_client_new (arguments > 1 ? argument[1] : "");
   if (!client) {
      fprintf (stderr, "work URI [refused]\n");
      return 1;
   }
   mongoc_client_set_error_api (client, MONGOC_ERROR_API_VERSION_2);
   if (arguments > 2)
      refused (client);
   else
      work (client);
   mongoc_client_destroy (client);
   mongoc_cleanup ();
   return 0;
}
