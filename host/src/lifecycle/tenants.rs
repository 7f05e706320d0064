//! Tenant isolation in plugins: no tenant sees data of another, even if a plugin keeps the data.

use batchwright_store::accounts::{Actor, NewProject};

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn plugin_that_keeps_data_returns_it_only_to_the_same_tenant() {
    let mut server = TestServer::new("", "").await;
    server.add_plugin("hostile", "target/hostile/hostile.wasm", "models = ['hostile']\n").await;
    for tenant in ["one", "two"] {
        let project = NewProject {
            id: format!("proj_{tenant}").into(),
            slug: tenant.into(),
            name: tenant.into(),
        };
        let by = Actor { key: None, address: None, at: server.clock.now() };
        server.engine().parts().store.create_project(project, by).await.unwrap();
    }
    let mut kept = Vec::new();
    for (tenant, secret) in
        [("one", "the secret of one"), ("two", "the secret of two"), ("one", "another of one")]
    {
        server.tenant = tenant;
        // As many concurrent requests as instances, so that each instance has seen the secret.
        let lines: Vec<Value> =
            (0..200).map(|line| chat(&format!("ask {line}"), "hostile", secret)).collect();
        let id = server.create(&lines).await;
        server.ended(&id).await;
        // An idle instance answers, and each of them has seen the secret.
        let id = server.create(&[chat("kept", "hostile", "")]).await;
        let batch = server.ended(&id).await;
        let results = server.results(batch.output_file_id.as_ref()).await;
        kept.push(results.last().unwrap()["response"]["body"]["kept"].as_str().unwrap().to_owned());
    }
    assert!(kept[0].contains("the secret of one") && !kept[0].contains("the secret of two"));
    assert!(kept[1].contains("the secret of two") && !kept[1].contains("of one"), "{}", kept[1]);
    assert!(kept[2].contains("another of one") && !kept[2].contains("the secret of two"));
}
