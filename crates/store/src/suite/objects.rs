//! Suite of object stores.

use std::sync::Arc;

use batchwright_domain::ids::ObjectKey;
use futures_util::TryStreamExt;

use crate::objects::{ObjectWriter, Objects, read_in_chunks};
use crate::{Result, StoreError};

type Store = Arc<dyn Objects>;

fn key(tenant: &str, file: &str) -> ObjectKey {
    ObjectKey { tenant: tenant.into(), file: file.into() }
}

/// Returns bytes that differ from place to place, for two parts and a half.
fn content(objects: &Store) -> Vec<u8> {
    let bytes = objects.part_size().target * 5 / 2;
    (0..bytes).map(|place| (place % 251) as u8).collect()
}

async fn write(objects: &Store, key: &ObjectKey, content: &[u8]) -> Result<u64> {
    let mut writer = ObjectWriter::create(&**objects, key).await?;
    for piece in content.chunks(10_000) {
        writer.write(piece).await?;
    }
    assert_eq!(writer.written(), content.len() as u64);
    writer.finish().await
}

fn is_missing<T>(result: Result<T>) -> bool {
    matches!(result, Err(StoreError::Missing(_)))
}

pub(crate) async fn object_of_many_parts_is_read_in_ranges_and_chunks(objects: Store) {
    let (mine, content) = (key("t", "file-a"), content(&objects));
    let size = content.len() as u64;
    assert_eq!(write(&objects, &mine, &content).await.unwrap(), size);
    assert_eq!(objects.size(&mine).await.unwrap(), size);
    assert_eq!(objects.read_range(&mine, 7..20_007).await.unwrap(), content[7..20_007]);
    let chunks = read_in_chunks(objects.clone(), mine, 3..size, 9_999);
    let chunks: Vec<_> = chunks.try_collect().await.unwrap();
    assert!(chunks.iter().all(|chunk| chunk.len() <= 9_999));
    assert_eq!(chunks.concat(), content[3..]);
    // Another tenant has no such object.
    assert!(is_missing(objects.size(&key("other", "file-a")).await));
}

pub(crate) async fn unfinished_object_is_missing(objects: Store) {
    let (mine, content) = (key("t", "file-a"), content(&objects));
    let mut writer = ObjectWriter::create(&*objects, &mine).await.unwrap();
    writer.write(&content).await.unwrap();
    assert!(is_missing(objects.size(&mine).await));
    drop(writer);
    assert!(is_missing(objects.size(&mine).await));
    let mut writer = ObjectWriter::create(&*objects, &mine).await.unwrap();
    writer.write(&content).await.unwrap();
    writer.abort().await;
    assert!(is_missing(objects.read_range(&mine, 0..1).await));
}

pub(crate) async fn second_writer_replaces_the_object_as_a_whole(objects: Store) {
    let (mine, content) = (key("t", "file-a"), content(&objects));
    write(&objects, &mine, &content).await.unwrap();
    let mut writer = ObjectWriter::create(&*objects, &mine).await.unwrap();
    writer.write(b"new").await.unwrap();
    assert_eq!(objects.size(&mine).await.unwrap(), content.len() as u64);
    assert_eq!(writer.finish().await.unwrap(), 3);
    assert_eq!(objects.read_range(&mine, 0..3).await.unwrap(), "new");
    assert_eq!(objects.size(&mine).await.unwrap(), 3);
}

pub(crate) async fn deleted_object_is_missing_and_can_be_deleted_again(objects: Store) {
    let [mine, other] = ["file-a", "file-b"].map(|file| key("t", file));
    for key in [&mine, &other] {
        write(&objects, key, b"content").await.unwrap();
    }
    objects.delete(&mine).await.unwrap();
    objects.delete(&mine).await.unwrap();
    assert!(is_missing(objects.size(&mine).await));
    assert_eq!(objects.size(&other).await.unwrap(), 7);
}

pub(crate) async fn short_object_is_missing_data(objects: Store) {
    let mine = key("t", "file-a");
    write(&objects, &mine, b"content").await.unwrap();
    assert!(is_missing(objects.read_range(&mine, 0..8).await));
    assert!(is_missing(objects.read_range(&mine, 100..108).await));
    assert_eq!(objects.read_range(&mine, 0..7).await.unwrap(), "content");
}

pub(crate) async fn probe_leaves_nothing(objects: Store) {
    objects.probe().await.unwrap();
    objects.probe().await.unwrap();
    let mine = key("t", "file-a");
    write(&objects, &mine, b"content").await.unwrap();
    objects.probe().await.unwrap();
    assert_eq!(objects.read_range(&mine, 0..7).await.unwrap(), "content");
}
