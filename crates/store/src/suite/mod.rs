//! Tests that every backend passes, written against the traits alone.
//!
//! A backend implements [`Fixture`] or gives a function that opens its objects, and calls
//! [`store_suite!`] or [`objects_suite!`], which make a test of each function of [`store`] or
//! [`objects`].

pub(crate) mod objects;
pub(crate) mod store;

use std::sync::Arc;

use crate::Store;

/// Database of a backend for one test, empty at first.
pub(crate) trait Fixture {
    /// Creates an empty database.
    fn new() -> Self;
    /// Opens the database, again after the store that was opened before is closed.
    fn open(&self) -> Arc<dyn Store>;
}

/// Makes a test of each function of the suite of stores.
macro_rules! store_suite {
    ($fixture:ty: $($test:ident)*) => {
        $(
            #[tokio::test]
            async fn $test() {
                $crate::suite::store::$test(<$fixture as $crate::suite::Fixture>::new()).await;
            }
        )*
    };
    ($fixture:ty) => {
        $crate::suite::store_suite! { $fixture:
            files_are_listed_in_order_and_pages_continue_after_an_id
            deleted_file_is_removable_once_no_batch_reads_it
            tombstone_keeps_the_place_of_a_removed_file_until_it_is_purged
            foreign_ids_are_unknown
            object_without_registration_gets_no_record
            abandoned_object_is_taken_once_and_not_written_meanwhile
            registration_in_time_keeps_its_object
            reopened_store_ends_the_registrations_and_claims_of_its_owner
            idempotency_key_creates_one_batch
            batch_pages_end_at_a_number_and_at_a_size
            claim_succeeds_once_and_returns_in_the_order_of_the_lane
            batch_whose_window_is_about_to_end_is_found_behind_older_ones
            batch_without_a_deadline_hides_no_other_and_never_expires
            overview_counts_open_batches_and_orders_them_by_deadline
            expired_lease_is_not_taken_over_by_its_own_holder
            end_of_a_batch_inserts_an_event_for_each_endpoint_that_asks
            delivery_is_claimed_once_in_order_and_again_after_its_lease
            failing_endpoint_is_disabled_and_enabled_by_a_change
            progress_has_open_batches_and_those_that_ended_since
            stale_claim_changes_nothing
            renewal_returns_the_order_to_cancel
            backoff_delays_a_batch_until_it_ends_or_is_ended
            cancelled_batch_ends_as_cancelled_whatever_its_worker_says
            line_keeps_its_first_result_and_counts_once
            results_are_read_in_order_within_a_size
            saved_job_is_replaced_and_deleted
            finished_batch_has_its_files_and_discards_its_results
            batch_has_the_lifetime_of_its_project
            ended_batch_is_deleted_once_its_files_are_gone
            closed_store_refuses_writes
            default_project_exists_and_projects_are_listed_by_page
            slug_is_never_used_again_and_a_name_only_after_archiving
            archived_project_creates_nothing_and_its_batches_are_cancelled
            key_is_found_with_its_owner_until_it_or_its_account_is_deleted
            keys_of_another_holder_are_unknown
            last_admin_key_is_not_deleted
            last_use_of_a_key_never_goes_back
            each_change_has_one_entry_in_the_audit_log
            limits_and_models_of_a_project_are_changed_one_by_one
            concurrent_creations_with_room_for_one_create_one
            stored_bytes_are_counted_until_their_object_is_removed
            result_counts_once_in_usage_and_costs
            usage_stays_when_its_key_is_deleted
            usage_of_online_requests_is_told_from_that_of_batches
            secrets_of_a_tenant_are_replaced_listed_and_deleted
            money_is_counted_by_month_and_requests_by_day
            old_usage_is_merged_into_hours
            limits_of_models_and_budgets_are_changed
            enqueued_tokens_are_reserved_until_their_batch_ends
            batch_over_the_token_limit_waits_for_its_turn
        }
    };
}

/// Makes a test of each function of the suite of object stores, for a function that opens an empty
/// one and returns it with what keeps it alive.
macro_rules! objects_suite {
    ($open:expr => $($test:ident)*) => {
        $(
            #[tokio::test]
            async fn $test() {
                let (objects, _guard) = $open();
                $crate::suite::objects::$test(objects).await;
            }
        )*
    };
    ($open:expr) => {
        $crate::suite::objects_suite! { $open =>
            object_of_many_parts_is_read_in_ranges_and_chunks
            unfinished_object_is_missing
            second_writer_replaces_the_object_as_a_whole
            deleted_object_is_missing_and_can_be_deleted_again
            short_object_is_missing_data
            probe_leaves_nothing
        }
    };
}

pub(crate) use {objects_suite, store_suite};
