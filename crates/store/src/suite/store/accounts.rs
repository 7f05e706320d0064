//! Projects, service accounts, keys and the audit log.

use batchwright_domain::ids::{KeyId, ServiceAccountId};
use batchwright_domain::limits::{Limit, ModelLimit, ModelRule};
use batchwright_domain::status::Status;

use super::*;
use crate::Paged;
use crate::accounts::{
    AuditQuery, KeyChanges, KeyHolder, KeyRecord, LimitChanges, ListQuery, NewKey,
    NewServiceAccount,
};

fn by(at: Timestamp) -> Actor {
    Actor { key: Some("key_admin".into()), address: Some("127.0.0.1".into()), at }
}

fn all() -> ListQuery {
    ListQuery { after: None, limit: 100, order: Order::OldestFirst }
}

fn entries<T>(paged: Paged<T>) -> (Vec<T>, bool) {
    match paged {
        Paged::Page(page) => (page.items, page.has_more),
        Paged::UnknownAfter => panic!("the page is unknown"),
    }
}

fn new_project(id: &str, slug: &str, name: &str) -> NewProject {
    NewProject { id: id.into(), slug: slug.into(), name: name.into() }
}

fn new_key(id: &str) -> NewKey {
    NewKey {
        id: id.into(),
        name: "night".into(),
        digest: [7; 32],
        redacted: "bw_...".into(),
        scopes: vec!["api.batch.read".into(), "api.files.read".into()],
        expires_at: Some(at(9_000_000)),
    }
}

fn new_account(id: &str) -> NewServiceAccount {
    NewServiceAccount { id: id.into(), name: "runner".into(), is_member: true }
}

/// Creates an account with a key in a project.
async fn account_with_key(store: &dyn Store, project: &ProjectId, account: &str, key: &str) {
    let created =
        store.create_account(project, new_account(account), Some(new_key(key)), by(NOW)).await;
    assert!(created.unwrap().is_member);
}

async fn events(store: &dyn Store) -> Vec<String> {
    let query = AuditQuery { limit: 100, ..AuditQuery::default() };
    let (entries, _) = entries(store.audit_log(query).await.unwrap());
    entries.into_iter().rev().map(|entry| entry.event).collect()
}

pub(crate) async fn default_project_exists_and_projects_are_listed_by_page(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let (projects, has_more) = entries(store.projects(all(), false).await.unwrap());
    let slugs: Vec<_> = projects.iter().map(|project| project.slug.to_string()).collect();
    assert_eq!(slugs, ["default", "t", "other"]);
    assert!(!has_more);
    let after = |id: &ProjectId, order| ListQuery { after: Some(id.to_string()), limit: 1, order };
    let (page, has_more) =
        entries(store.projects(after(&projects[0].id, Order::OldestFirst), false).await.unwrap());
    assert_eq!(page, projects[1..2]);
    assert!(has_more);
    let (page, has_more) =
        entries(store.projects(after(&projects[1].id, Order::NewestFirst), false).await.unwrap());
    assert_eq!(page, projects[..1]);
    assert!(!has_more);
    let unknown = ListQuery { after: Some("proj_x".into()), ..all() };
    assert!(matches!(store.projects(unknown, true).await.unwrap(), Paged::UnknownAfter));
}

pub(crate) async fn slug_is_never_used_again_and_a_name_only_after_archiving(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    let create = async |id: &str, name: &str| {
        store.create_project(new_project(id, "acme", name), by(NOW)).await
    };
    assert_eq!(create("proj_1", "Acme").await.unwrap().slug.as_str(), "acme");
    assert_eq!(refusal(create("proj_2", "ACME").await), Refusal::NameTaken);
    assert_eq!(create("proj_2", "Acme!").await.unwrap().slug.as_str(), "acme-2");
    store.archive_project(&"proj_1".into(), by(NOW)).await.unwrap();
    assert_eq!(create("proj_3", "Acme").await.unwrap().slug.as_str(), "acme-3");
    let rename =
        async |id: &str, name: &str| store.rename_project(&id.into(), name.into(), by(NOW)).await;
    assert_eq!(refusal(rename("proj_2", "acme").await), Refusal::NameTaken);
    assert_eq!(refusal(rename("proj_1", "x").await), Refusal::Archived);
    assert_eq!(refusal(rename("proj_x", "x").await), Refusal::UnknownProject);
    let renamed = rename("proj_3", "ACME").await.unwrap();
    assert_eq!((renamed.name.as_str(), renamed.slug.as_str()), ("ACME", "acme-3"));
}

pub(crate) async fn archived_project_creates_nothing_and_its_batches_are_cancelled(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    let id = project(&tenant());
    let claim = executing(&*store, "running", 1).await;
    create(&*store, "new").await;
    insert_file(&*store, file("file-in")).await;
    account_with_key(&*store, &id, "svc_1", "key_1").await;
    let theirs = store.create_batch(&"other".into(), new_batch("theirs"), None, None).await;
    theirs.unwrap();

    let archived = store.archive_project(&id, by(at(1_500_000))).await.unwrap();
    assert_eq!(archived.archived_at, Some(at(1_500_000)));
    let again = store.archive_project(&id, by(at(1_600_000))).await.unwrap();
    assert_eq!(again, archived, "archived once");
    assert!(store.renew(&claim, LEASE).await.unwrap().cancel);
    for name in ["running", "new"] {
        let batch = batch(&*store, name).await;
        assert_eq!(batch.status, Status::Cancelling);
        assert_eq!(batch.times.cancelling_at, Some(at(1_500_000)));
    }
    let theirs = store.batch(&"other".into(), &"theirs".into()).await.unwrap().unwrap();
    assert_eq!(theirs.status, Status::Validating);

    let created = store.create_batch(&tenant(), new_batch("later"), None, None).await;
    assert_eq!(refusal(created), Refusal::Archived);
    store.register_object(&key("file-late"), NOW, LEASE).await.unwrap();
    let inserted = store.insert_file(&tenant(), file("file-late"), StorageBounds::default()).await;
    assert_eq!(refusal(inserted), Refusal::Archived);
    let account = store.create_account(&id, new_account("svc_2"), None, by(NOW)).await;
    assert_eq!(refusal(account), Refusal::Archived);
    let new = store.create_project_key(&id, &"svc_1".into(), new_key("key_2"), by(NOW)).await;
    assert_eq!(refusal(new), Refusal::Archived);
    // What exists can still be read, and deleted.
    assert!(store.key(&"key_1".into()).await.unwrap().is_some());
    assert!(store.file(&tenant(), &"file-in".into(), NOW).await.unwrap().is_some());
    assert!(store.delete_file(&tenant(), &"file-in".into(), NOW).await.unwrap());
    let (active, _) = entries(store.projects(all(), false).await.unwrap());
    assert!(active.iter().all(|project| project.id != id));
    let (with_archived, _) = entries(store.projects(all(), true).await.unwrap());
    assert!(with_archived.iter().any(|project| project.id == id));
}

pub(crate) async fn key_is_found_with_its_owner_until_it_or_its_account_is_deleted(
    fixture: impl Fixture,
) {
    let store = open(&fixture).await;
    assert!(!store.had_key().await.unwrap());
    let id = project(&tenant());
    account_with_key(&*store, &id, "svc_1", "key_1").await;
    let second = store.create_project_key(&id, &"svc_1".into(), new_key("key_2"), by(NOW)).await;
    let second = second.unwrap();
    let found = async |key: &str| store.key(&key.into()).await.unwrap();
    let first: KeyRecord = found("key_1").await.unwrap();
    assert_eq!(first.digest, [7; 32]);
    assert_eq!(first.scopes, ["api.batch.read", "api.files.read"]);
    assert_eq!(first.expires_at, Some(at(9_000_000)));
    let owner = first.owner.unwrap();
    assert_eq!((owner.project.slug, owner.account.name.as_str()), (tenant(), "runner"));
    assert_eq!(found("key_2").await, Some(second));

    let holder = KeyHolder::Project(id.clone());
    let changes = KeyChanges { expires_at: Some(at(8_000_000)), scopes: Some(vec!["x".into()]) };
    let changed = store.update_key(&holder, &"key_2".into(), changes, by(NOW)).await.unwrap();
    assert_eq!((changed.expires_at, changed.scopes), (Some(at(8_000_000)), vec!["x".to_owned()]));
    let late = at(9_000_000);
    let renewed = store.update_key(&holder, &"key_1".into(), KeyChanges::default(), by(late)).await;
    assert_eq!(refusal(renewed), Refusal::ExpiredKey);
    let unchanged =
        store.update_key(&holder, &"key_2".into(), KeyChanges::default(), by(NOW)).await.unwrap();
    assert_eq!(
        (unchanged.expires_at, unchanged.scopes),
        (Some(at(8_000_000)), vec!["x".to_owned()])
    );

    store.delete_key(&holder, &"key_1".into(), by(NOW)).await.unwrap();
    assert_eq!(found("key_1").await, None);
    let again = store.delete_key(&holder, &"key_1".into(), by(NOW)).await;
    assert_eq!(refusal(again), Refusal::UnknownKey);
    // A list continues after a key that was deleted meanwhile.
    let rest = ListQuery { after: Some("key_1".into()), ..all() };
    let (rest, _) = entries(store.keys(&holder, rest).await.unwrap());
    assert_eq!(rest.iter().map(|key| key.id.as_str()).collect::<Vec<_>>(), ["key_2"]);
    store.delete_account(&id, &"svc_1".into(), by(NOW)).await.unwrap();
    assert_eq!(found("key_2").await, None);
    assert_eq!(store.account(&id, &"svc_1".into()).await.unwrap(), None);
    assert!(store.had_key().await.unwrap(), "a server that had a key stays closed");
}

pub(crate) async fn keys_of_another_holder_are_unknown(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let (id, other) = (project(&tenant()), project(&"other".into()));
    account_with_key(&*store, &id, "svc_1", "key_1").await;
    store.create_admin_key(new_key("key_a"), operator()).await.unwrap();
    let (account, key): (ServiceAccountId, KeyId) = ("svc_1".into(), "key_1".into());
    for holder in [KeyHolder::Project(other.clone()), KeyHolder::Organization] {
        assert_eq!(store.key_of(&holder, &key).await.unwrap(), None);
        let changed = store.update_key(&holder, &key, KeyChanges::default(), by(NOW)).await;
        assert_eq!(refusal(changed), Refusal::UnknownKey);
        let deleted = store.delete_key(&holder, &key, by(NOW)).await;
        assert_eq!(refusal(deleted), Refusal::UnknownKey);
        let after = ListQuery { after: Some("key_1".into()), ..all() };
        assert!(matches!(store.keys(&holder, after).await.unwrap(), Paged::UnknownAfter));
    }
    assert_eq!(store.account(&other, &account).await.unwrap(), None);
    let deleted = store.delete_account(&other, &account, by(NOW)).await;
    assert_eq!(refusal(deleted), Refusal::UnknownAccount);
    let created = store.create_project_key(&other, &account, new_key("key_2"), by(NOW)).await;
    assert_eq!(refusal(created), Refusal::UnknownAccount);
    let renamed = store.rename_account(&other, &account, "x".into(), by(NOW)).await;
    assert_eq!(refusal(renamed), Refusal::UnknownAccount);
    let (admins, _) = entries(store.keys(&KeyHolder::Organization, all()).await.unwrap());
    assert_eq!(admins.len(), 1);
    assert!(admins[0].owner.is_none());
}

pub(crate) async fn last_admin_key_is_not_deleted(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let keys = KeyHolder::Organization;
    let create = async |id: &str, expires_at| {
        let new = NewKey { expires_at, scopes: Vec::new(), ..new_key(id) };
        store.create_admin_key(new, by(NOW)).await.unwrap();
    };
    create("key_1", None).await;
    // A key with scopes cannot administer the server.
    let restricted = NewKey { expires_at: None, ..new_key("key_0") };
    store.create_admin_key(restricted, by(NOW)).await.unwrap();
    create("key_2", Some(at(NOW.as_millis() + 1))).await;
    let delete = async |id: &str, at| store.delete_key(&keys, &id.into(), by(at)).await;
    let later = at(NOW.as_millis() + 1);
    assert_eq!(refusal(delete("key_1", later).await), Refusal::LastAdminKey);
    delete("key_2", later).await.unwrap();
    create("key_3", None).await;
    delete("key_1", later).await.unwrap();
    assert_eq!(refusal(delete("key_3", later).await), Refusal::LastAdminKey);
    delete("key_0", later).await.unwrap();
}

pub(crate) async fn last_use_of_a_key_never_goes_back(fixture: impl Fixture) {
    let store = open(&fixture).await;
    store.create_admin_key(new_key("key_1"), operator()).await.unwrap();
    for (used, expected) in [(20, 20), (30, 30), (25, 30)] {
        let uses = vec![("key_1".into(), at(used)), ("key_x".into(), at(used))];
        store.record_key_uses(uses).await.unwrap();
        let key = store.key(&"key_1".into()).await.unwrap().unwrap();
        assert_eq!(key.last_used_at, Some(at(expected)));
    }
}

pub(crate) async fn each_change_has_one_entry_in_the_audit_log(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let before = events(&*store).await.len();
    let id: ProjectId = "proj_1".into();
    let holder = KeyHolder::Project(id.clone());
    store.create_project(new_project("proj_1", "acme", "Acme"), by(NOW)).await.unwrap();
    store.rename_project(&id, "Acme Labs".into(), by(NOW)).await.unwrap();
    store.create_account(&id, new_account("svc_1"), Some(new_key("key_1")), by(NOW)).await.unwrap();
    store.rename_account(&id, &"svc_1".into(), "x".into(), by(NOW)).await.unwrap();
    store.update_key(&holder, &"key_1".into(), KeyChanges::default(), by(NOW)).await.unwrap();
    store.delete_key(&holder, &"key_1".into(), by(NOW)).await.unwrap();
    store.delete_account(&id, &"svc_1".into(), by(at(2_000_000))).await.unwrap();
    store.create_admin_key(new_key("key_2"), operator()).await.unwrap();
    store.create_admin_key(new_key("key_3"), operator()).await.unwrap();
    store.delete_key(&KeyHolder::Organization, &"key_2".into(), by(NOW)).await.unwrap();
    for changes in [LimitChanges::default(), [(Limit::OpenBatches, None)].into()] {
        store.update_limits(&id, changes, by(NOW)).await.unwrap();
    }
    let per_day = [(ModelLimit::RequestsPerDay, Some(1))];
    store.update_model_limits(&id, "m", per_day.into(), by(NOW)).await.unwrap();
    for cents in [Some(1), Some(1), None] {
        store.set_spend_limit(&id, cents, by(NOW)).await.unwrap();
    }
    store.set_models(&id, ModelRule::default(), by(NOW)).await.unwrap();
    store.archive_project(&id, by(NOW)).await.unwrap();
    // A refused change has no entry.
    refusal(store.rename_project(&id, "x".into(), by(NOW)).await);
    refusal(store.create_account(&id, new_account("svc_2"), None, by(NOW)).await);
    assert_eq!(
        events(&*store).await[before..],
        [
            "project.created",
            "project.updated",
            "service_account.created",
            "api_key.created",
            "service_account.updated",
            "api_key.updated",
            "api_key.deleted",
            "service_account.deleted",
            "tenant.admin_api_key.created",
            "tenant.admin_api_key.created",
            "tenant.admin_api_key.deleted",
            "project.limits.updated",
            "rate_limit.updated",
            "project.spend_limit.updated",
            "project.spend_limit.deleted",
            "project.model_permissions.updated",
            "project.archived",
        ]
    );
    let find = async |query: AuditQuery| {
        let (found, has_more) = entries(store.audit_log(query).await.unwrap());
        (found.into_iter().map(|entry| entry.event).collect::<Vec<_>>(), has_more)
    };
    let query = AuditQuery { limit: 2, projects: vec!["proj_1".into()], ..AuditQuery::default() };
    assert_eq!(
        find(query.clone()).await,
        (vec!["project.archived".into(), "project.model_permissions.updated".into()], true)
    );
    let from = AuditQuery { from: Some(at(2_000_000)), ..query.clone() };
    assert_eq!(find(from).await, (vec!["service_account.deleted".into()], false));
    let events = vec!["project.created".to_owned(), "project.updated".to_owned()];
    let query = AuditQuery { limit: 9, events, resources: vec!["proj_1".into()], ..query };
    let (found, _) = entries(store.audit_log(query).await.unwrap());
    let created = found.last().unwrap();
    assert_eq!(created.key, Some("key_admin".into()));
    assert_eq!(created.address.as_deref(), Some("127.0.0.1"));
    assert_eq!(created.project, Some((id, "Acme Labs".into())));
    assert!(created.details.contains("\"name\":\"Acme\""), "{}", created.details);
}

pub(crate) async fn secrets_of_a_tenant_are_replaced_listed_and_deleted(fixture: impl Fixture) {
    let store = open(&fixture).await;
    let set = async |name: &str, sealed: &[u8], at: i64| {
        let sealed = sealed.to_vec();
        store.set_secret(&tenant(), "p", name, sealed, by(super::at(at))).await
    };
    set("api_key", b"one", 1).await.unwrap();
    let replaced = set("api_key", b"two", 2).await.unwrap();
    assert_eq!((replaced.created_at, replaced.updated_at), (at(1), at(2)));
    set("other", b"three", 3).await.unwrap();
    store.set_secret(&tenant(), "q", "api_key", b"four".to_vec(), by(NOW)).await.unwrap();
    let names = async |tenant: TenantId, plugin: Option<&str>| {
        let found = store.secrets(&tenant, plugin).await.unwrap().into_iter();
        found.map(|found| (found.name, found.sealed)).collect::<Vec<_>>()
    };
    let of_p = [("api_key".to_owned(), b"two".to_vec()), ("other".to_owned(), b"three".to_vec())];
    assert_eq!(names(tenant(), Some("p")).await, of_p);
    assert_eq!(names(tenant(), None).await.len(), 3);
    assert_eq!(names("other".into(), None).await, []);
    let delete = async |tenant: TenantId, name: &str| {
        store.delete_secret(&tenant, "p", name, by(NOW)).await.unwrap()
    };
    assert!(!delete("other".into(), "api_key").await && !delete(tenant(), "nothing").await);
    assert!(delete(tenant(), "api_key").await && !delete(tenant(), "api_key").await);
    let logged = events(&*store).await;
    let of_secrets = logged.iter().filter(|event| event.starts_with("credential."));
    assert_eq!(of_secrets.count(), 5);
    store.archive_project(&project(&tenant()), by(NOW)).await.unwrap();
    assert_eq!(refusal(set("api_key", b"x", 9).await), Refusal::Archived);
}
