//! The directory adapter on a real file system.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use proptest::prelude::*;
use serde_json::json;
use stockade_l2::AdapterError;

use super::{form, list, name, named, open, open_fs, value};

fn file_of(directory: &tempfile::TempDir, number: u8) -> PathBuf {
    directory.path().join(name(number).file_name().unwrap())
}

fn quarantined(directory: &tempfile::TempDir) -> usize {
    fs::read_dir(directory.path().join(".stockade-quarantine")).map_or(0, Iterator::count)
}

#[tokio::test]
async fn a_value_is_a_file_with_exactly_its_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    let bytes = value(1, 10_000);
    assert_eq!(adapter.find(&[name(1)]).await, Ok(vec![false]));
    assert_eq!(
        adapter.load(&name(1), form(10_000)).await,
        Err(AdapterError::NotFound)
    );
    adapter.store(&name(1), bytes.clone(), 7).await.unwrap();
    assert_eq!(fs::read(file_of(&directory, 1)).unwrap(), bytes);
    assert_eq!(
        adapter.find(&[name(2), name(1)]).await,
        Ok(vec![false, true])
    );
    assert_eq!(adapter.load(&name(1), form(10_000)).await, Ok(bytes));
    assert_eq!(
        adapter.delete(&[name(1), name(2)]).await,
        Ok(vec![true, false])
    );
    // Nothing else stays behind.
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn direct_io_writes_the_same_bytes() {
    // tmpfs has no direct I/O on older kernels, and then the page cache is used.
    let directory = tempfile::tempdir_in("/tmp").unwrap();
    let spec = json!({"type": "fs_native", "base_path": directory.path(), "use_odirect": true,
                      "relative_tmp_dir": "tmp/a", "read_ahead_size": 4096});
    let adapter = open(&spec);
    for length in [8192, 5000] {
        let bytes = value(3, length);
        adapter.store(&name(3), bytes.clone(), 7).await.unwrap();
        assert_eq!(fs::read(file_of(&directory, 3)).unwrap(), bytes);
        assert_eq!(adapter.load(&name(3), form(length as u64)).await, Ok(bytes));
    }
}

#[tokio::test]
async fn what_lmcache_wrote_is_taken_by_its_length_also_when_it_is_filled_up() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    let bytes = value(4, 5000);
    fs::write(file_of(&directory, 4), &bytes).unwrap();
    assert_eq!(adapter.load(&name(4), form(5000)).await, Ok(bytes.clone()));
    // As `fs_native` with O_DIRECT leaves it.
    let mut filled = bytes.to_vec();
    filled.resize(8192, 0);
    fs::write(file_of(&directory, 4), &filled).unwrap();
    assert_eq!(adapter.load(&name(4), form(5000)).await, Ok(bytes));
}

#[tokio::test]
async fn a_file_that_lmcache_put_in_place_of_ours_is_not_taken_for_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    adapter.store(&name(5), value(5, 300), 7).await.unwrap();
    // LMCache writes beside and renames; other bytes of the same length are as good as ours.
    let temporary = directory.path().join("x.tmp");
    fs::write(&temporary, value(6, 300)).unwrap();
    fs::rename(&temporary, file_of(&directory, 5)).unwrap();
    assert_eq!(adapter.load(&name(5), form(300)).await, Ok(value(6, 300)));
}

#[tokio::test]
async fn a_torn_or_flipped_file_is_a_miss_and_moved_aside() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    let tear = |bytes: &mut Vec<u8>| bytes.truncate(1234);
    let flip = |bytes: &mut Vec<u8>| bytes[77] ^= 4;
    let grow = |bytes: &mut Vec<u8>| bytes.extend([0; 9000]);
    let damages: [fn(&mut Vec<u8>); 3] = [tear, flip, grow];
    for (count, damage) in damages.into_iter().enumerate() {
        adapter.store(&name(7), value(7, 4096), 7).await.unwrap();
        let file = file_of(&directory, 7);
        let mut bytes = fs::read(&file).unwrap();
        damage(&mut bytes);
        // In place, as a failing disk would: the inode and its seal stay.
        fs::write(&file, &bytes).unwrap();
        let error = adapter.load(&name(7), form(4096)).await.unwrap_err();
        assert!(
            matches!(error, AdapterError::Damaged { moved: true, .. }),
            "{error:?}"
        );
        assert_eq!(
            adapter.find(&[name(7)]).await,
            Ok(vec![false]),
            "the name is free again"
        );
        assert_eq!(quarantined(&directory), count + 1);
    }
    // Without a seal only the length can tell.
    fs::write(file_of(&directory, 8), value(8, 100)).unwrap();
    let error = adapter.load(&name(8), form(4096)).await.unwrap_err();
    assert!(
        matches!(error, AdapterError::Damaged { moved: true, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_good_value_of_another_layout_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    adapter.store(&name(9), value(9, 100), 7).await.unwrap();
    for wanted in [64, 4096, 99] {
        let error = adapter.load(&name(9), form(wanted)).await.unwrap_err();
        assert_eq!(error, AdapterError::OtherForm { found: 100 });
    }
    adapter.store(&name(9), value(9, 50_000), 7).await.unwrap();
    let error = adapter.load(&name(9), form(64)).await.unwrap_err();
    assert_eq!(error, AdapterError::OtherForm { found: 50_000 });
    assert_eq!(
        adapter.load(&name(9), form(50_000)).await,
        Ok(value(9, 50_000))
    );
}

#[tokio::test]
async fn the_quarantine_does_not_fill_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let adapter = open_fs(&directory);
    for _ in 0..70 {
        fs::write(file_of(&directory, 1), b"short").unwrap();
        adapter.load(&name(1), form(4096)).await.unwrap_err();
    }
    assert_eq!(quarantined(&directory), 64);
}

#[tokio::test]
async fn nothing_in_the_directory_leads_out_of_it() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, value(1, 64)).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let adapter =
        open(&json!({"type": "fs", "base_path": directory.path(), "folder_by_salt": true}));
    // A link to a file of the right length, a FIFO, a folder, and a folder that is a link.
    symlink(&secret, file_of(&directory, 1)).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        file_of(&directory, 2),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    fs::create_dir(file_of(&directory, 3)).unwrap();
    symlink(outside.path(), directory.path().join("salt-s")).unwrap();
    for number in 1..=3 {
        assert_eq!(
            adapter.find(&[name(number)]).await,
            Ok(vec![false]),
            "{number}"
        );
        let error = adapter.load(&name(number), form(64)).await.unwrap_err();
        assert!(
            matches!(error, AdapterError::Damaged { moved: false, .. }),
            "{error:?}"
        );
    }
    assert!(list(&adapter, None).await.is_empty());
    assert!(
        adapter
            .store(&named(4, "s"), value(4, 64), 7)
            .await
            .is_err()
    );
    // Storing replaces the link, not what it points to.
    adapter.store(&name(1), value(2, 64), 7).await.unwrap();
    assert_eq!(adapter.load(&name(1), form(64)).await, Ok(value(2, 64)));
    assert_eq!(fs::read(&secret).unwrap(), value(1, 64));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

#[tokio::test]
async fn values_are_listed_by_salt_with_and_without_folders() {
    for folder_by_salt in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let spec =
            json!({"type": "fs", "base_path": directory.path(), "folder_by_salt": folder_by_salt});
        let adapter = open(&spec);
        for (number, salt) in [(1, ""), (2, "a"), (3, "b"), (4, "..")] {
            adapter
                .store(
                    &named(number, salt),
                    value(number, 100 + usize::from(number)),
                    7,
                )
                .await
                .unwrap();
            assert_eq!(adapter.find(&[named(number, salt)]).await, Ok(vec![true]));
        }
        fs::write(directory.path().join("README"), "not a value").unwrap();
        let found = |entries: &[stockade_l2::Entry]| -> Vec<(u8, u64)> {
            entries
                .iter()
                .map(|entry| (entry.name.chunk_hash()[0], entry.bytes))
                .collect()
        };
        let mut all = found(&list(&adapter, None).await);
        all.sort_unstable();
        assert_eq!(all, [(1, 101), (2, 102), (3, 103), (4, 104)]);
        assert_eq!(found(&list(&adapter, Some("b")).await), [(3, 103)]);
        assert_eq!(found(&list(&adapter, Some("..")).await), [(4, 104)]);
        assert_eq!(
            adapter.delete(&[named(4, ".."), named(3, "b")]).await,
            Ok(vec![true, true])
        );
        assert_eq!(list(&adapter, None).await.len(), 2);
    }
}

#[tokio::test]
async fn temporary_files_of_killed_writers_go_and_others_stay() {
    let directory = tempfile::tempdir().unwrap();
    let [old, new, foreign] = [".stockade-00.tmp", ".stockade-01.tmp", "lmcache.tmp"]
        .map(|file| directory.path().join(file));
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(7200);
    for file in [&old, &new, &foreign] {
        fs::write(file, "half a val").unwrap();
    }
    for file in [&old, &foreign] {
        fs::File::options()
            .write(true)
            .open(file)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
    }
    let _adapter = open_fs(&directory);
    assert_eq!(
        [&old, &new, &foreign].map(|file| file.exists()),
        [false, true, true]
    );
}

#[test]
fn a_directory_that_cannot_be_used_is_said_at_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    fs::write(&file, "").unwrap();
    for (spec, part) in [
        (json!({"type": "fs", "base_path": file}), "base_path"),
        (
            json!({"type": "fs", "base_path": directory.path(), "relative_tmp_dir": "../x"}),
            "relative_tmp_dir",
        ),
        (
            json!({"type": "fs", "base_path": directory.path(), "relative_tmp_dir": "/x"}),
            "relative_tmp_dir",
        ),
    ] {
        let error = super::parse(&spec).unwrap().open().unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Stores, loads and deletes against a map, with a value torn or flipped now and then: what is
    /// loaded is what was stored last, or nothing.
    #[test]
    fn it_agrees_with_a_map(steps in proptest::collection::vec((0..5_u8, 0..4_u8, any::<u16>()), 1..60)) {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let adapter = open_fs(&directory);
            let mut model = std::collections::HashMap::new();
            for (step, number, random) in steps {
                match step {
                    0 | 1 => {
                        let bytes = value((random >> 8) as u8, 512);
                        adapter.store(&name(number), bytes.clone(), 7).await.unwrap();
                        model.insert(number, bytes);
                    }
                    2 => {
                        let was_there = model.remove(&number).is_some();
                        prop_assert_eq!(adapter.delete(&[name(number)]).await, Ok(vec![was_there]));
                    }
                    3 => {
                        let Some(bytes) = model.remove(&number) else { continue };
                        let mut bytes = bytes.to_vec();
                        let at = usize::from(random) % bytes.len();
                        if random % 2 == 0 { bytes.truncate(at) } else { bytes[at] ^= 1 }
                        fs::write(file_of(&directory, number), bytes).unwrap();
                        let loaded = adapter.load(&name(number), form(512)).await;
                        prop_assert_eq!(loaded.map_err(|error| error.reason()), Err("damaged"));
                    }
                    _ => {}
                }
                let loaded = adapter.load(&name(number), form(512)).await;
                prop_assert_eq!(loaded.ok(), model.get(&number).cloned());
            }
            Ok(())
        })?;
    }
}
