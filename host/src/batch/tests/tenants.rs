//! What one tenant says, no other gets to see: not by a plugin that keeps it, either.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn a_plugin_that_keeps_what_it_sees_shows_it_to_its_tenant_alone() {
    let mut house = House::new("", "").await;
    house.add_plugin("hostile", "target/hostile/hostile.wasm", "models = ['hostile']\n").await;
    let mut kept = Vec::new();
    for (tenant, secret) in
        [("one", "the secret of one"), ("two", "the secret of two"), ("one", "another of one")]
    {
        house.tenant = tenant;
        // As many at once as there may be instances, so that each of them has seen it.
        let lines: Vec<Value> = (0..200)
            .map(|line| chat(&format!("ask {line}"), "hostile", secret))
            .chain([chat("kept", "hostile", "")])
            .collect();
        let id = house.create(&lines).await;
        let batch = house.ended(&id).await;
        let results = house.results(batch.output_file_id.as_ref()).await;
        kept.push(results.last().unwrap()["response"]["body"]["kept"].as_str().unwrap().to_owned());
    }
    assert!(kept[0].contains("the secret of one") && !kept[0].contains("the secret of two"));
    assert!(kept[1].contains("the secret of two") && !kept[1].contains("of one"), "{}", kept[1]);
    assert!(kept[2].contains("another of one") && !kept[2].contains("the secret of two"));
}
