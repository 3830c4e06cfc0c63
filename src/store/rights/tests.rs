use super::*;

/// Pseudo-random numbers, the same each time.
struct Random(u64);

impl Random {
    fn below(&mut self, most: u32) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as u32 % most
    }

    fn file(&mut self) -> Permissions {
        let mode = self.below(0o1000);
        let (uid, gid) = (self.below(4), 10 + self.below(3));
        let list = (self.below(2) == 0).then(|| {
            let mut list = vec![AccessEntry { who: Who::Owner, bits: mode >> 6 }];
            for uid in 0..4 {
                if self.below(3) == 0 {
                    list.push(AccessEntry { who: Who::User(uid), bits: self.below(8) });
                }
            }
            list.push(AccessEntry { who: Who::Group, bits: self.below(8) });
            for gid in 10..13 {
                if self.below(3) == 0 {
                    list.push(AccessEntry { who: Who::NamedGroup(gid), bits: self.below(8) });
                }
            }
            list.push(AccessEntry { who: Who::Mask, bits: mode >> 3 & 7 });
            list.push(AccessEntry { who: Who::Other, bits: mode & 7 });
            list
        });
        Permissions { uid, gid, mode, list }
    }

    fn groups(&mut self) -> Vec<u32> {
        (10..13).filter(|_| self.below(2) == 0).collect()
    }
}

fn file(uid: u32, gid: u32, mode: u32) -> Permissions {
    Permissions { uid, gid, mode, list: None }
}

#[test]
fn the_first_class_that_fits_decides() {
    let private = file(2001, 100, 0o604);
    assert!(Subject::new(2001, vec![]).may(&private, READ | WRITE));
    assert!(!Subject::new(2002, vec![100]).may(&private, READ), "the group is shut out, whatever others may");
    assert!(Subject::new(2002, vec![7]).may(&private, READ));
    assert!(Subject::new(0, vec![]).may(&file(2001, 100, 0), READ | WRITE));
    assert!(!Subject::new(2001, vec![100]).may(&file(2001, 100, 0o077), READ), "the owner is shut out");
}

#[test]
fn in_a_sticky_directory_only_owners_rename() {
    let shared = file(0, 0, 0o41777);
    assert!(Subject::new(2001, vec![]).may_rename_in(&shared, 2001));
    assert!(!Subject::new(2001, vec![]).may_rename_in(&shared, 2002));
    assert!(Subject::new(0, vec![]).may_rename_in(&shared, 2002));
    assert!(Subject::new(2001, vec![]).may_rename_in(&file(2001, 0, 0o41777), 2002));
    assert!(Subject::new(2001, vec![]).may_rename_in(&file(0, 0, 0o40777), 2002));
    assert!(!Subject::new(2001, vec![]).may_rename_in(&file(0, 0, 0o40755), 2001));
}

#[test]
fn a_right_of_a_class_is_a_right_of_each_member() {
    let mut random = Random(7);
    let mut granted = 0;
    for _ in 0..200_000 {
        let (file, want) = (random.file(), 1 + random.below(7));
        let (uid, gid) = (random.below(4), 10 + random.below(3));
        let known = random.groups();
        let classes = [
            Class::Owner(Subject::new(uid, known.clone())),
            Class::Group { uid, gid },
            Class::Other { uid, gid },
        ];
        let user = random.below(4);
        let mut groups = random.groups();
        let class = if user == uid {
            groups.extend(known);
            &classes[0]
        } else if groups.contains(&gid) {
            &classes[1]
        } else {
            &classes[2]
        };
        if class.may(&file, want) {
            granted += 1;
            let subject = Subject::new(user, groups);
            assert!(subject.may(&file, want), "{class:?} {subject:?} {file:?} {want}");
        }
    }
    assert!(granted > 1000, "{granted}");
}

#[test]
fn obvious_rights_are_granted() {
    // An overlay of one user on a base that all may read.
    let base = file(0, 0, 0o644);
    for class in [
        Class::Owner(Subject::new(64055, vec![])),
        Class::Group { uid: 64055, gid: 5 },
        Class::Other { uid: 64055, gid: 5 },
    ] {
        assert!(class.may(&base, READ), "{class:?}");
        assert!(!class.may(&base, WRITE), "{class:?}");
    }
    let of_the_group = file(0, 108, 0o640);
    assert!(Class::Owner(Subject::new(64055, vec![108])).may(&of_the_group, READ));
    assert!(Class::Group { uid: 64055, gid: 108 }.may(&of_the_group, READ));
    assert!(!Class::Other { uid: 64055, gid: 108 }.may(&of_the_group, READ));
}
