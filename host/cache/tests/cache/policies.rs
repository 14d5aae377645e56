//! Policies against transcripts: some written by hand, some by LMCache itself.

use std::collections::{HashMap, HashSet};

use stockade_cache::PolicyKind;
use stockade_cache::eviction::{EntryFacts, EntryId, EvictionPolicy};

/// One policy and the keys of one transcript, handled as the core does.
struct Stage {
    policy: Box<dyn EvictionPolicy>,
    ids: HashMap<String, EntryId>,
    names: Vec<String>,
    locked: HashSet<EntryId>,
}

impl Stage {
    fn new(kind: PolicyKind) -> Self {
        Self {
            policy: kind.build(),
            ids: HashMap::new(),
            names: Vec::new(),
            locked: HashSet::new(),
        }
    }

    fn id(&mut self, name: &str) -> EntryId {
        *self.ids.entry(name.to_owned()).or_insert_with(|| {
            self.names.push(name.to_owned());
            self.names.len() as EntryId - 1
        })
    }

    fn evict(&mut self, count: usize) -> String {
        let mut victims = Vec::new();
        while victims.len() < count
            && let Some(id) = self.policy.take()
        {
            if self.locked.contains(&id) {
                self.policy.park(id);
            } else {
                self.policy.evicted(id);
                victims.push(self.names[id as usize].clone());
            }
        }
        victims.join(" ")
    }

    fn step(&mut self, verb: &str, keys: &[&str]) {
        for key in keys.iter().rev() {
            let id = self.id(key);
            let salt = key.split_once('/').map_or("", |(salt, _)| salt);
            match verb {
                "store" => self.policy.insert(
                    id,
                    EntryFacts {
                        fingerprint: id.into(),
                        salt: salt.bytes().map(u32::from).sum(),
                        weight: 1,
                    },
                ),
                "hit" => self.policy.touch(id),
                "end" => self.policy.session_ended(id),
                "remove" => self.policy.remove(id),
                "lock" => assert!(self.locked.insert(id)),
                "unlock" => {
                    assert!(self.locked.remove(&id));
                    self.policy.restore(id);
                }
                verb => panic!("no such step: {verb}"),
            }
        }
    }
}

/// Runs all transcripts of a file; returns how many there were.
fn play(transcripts: &str) -> usize {
    let mut count = 0;
    let mut stage = Stage::new(PolicyKind::Noop);
    for (number, line) in transcripts.lines().enumerate() {
        let text = line.trim();
        if text.is_empty() || text.starts_with('#') {
            continue;
        }
        if !line.starts_with(' ') {
            let name = text.split(' ').next().unwrap();
            stage = Stage::new(name.parse().unwrap());
            count += 1;
            continue;
        }
        match text.strip_prefix("evict ") {
            Some(rest) => {
                let (asked, expected) = rest.split_once(':').unwrap();
                let victims = stage.evict(asked.parse().unwrap());
                assert_eq!(victims, expected.trim(), "line {}", number + 1);
            }
            None => {
                let mut words = text.split(' ');
                let verb = words.next().unwrap();
                stage.step(verb, &words.collect::<Vec<_>>());
            }
        }
    }
    count
}

#[test]
fn every_policy_evicts_what_its_transcript_says() {
    assert_eq!(play(include_str!("../golden/policies.txt")), 7);
}

#[test]
fn lru_and_arc_evict_what_lmcaches_do() {
    assert_eq!(play(include_str!("../golden/policies_lmcache.txt")), 24);
}
