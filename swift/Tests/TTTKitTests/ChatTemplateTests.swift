import TTTFormats
import XCTest

@testable import TTTKit
import TTTTestSupport

final class ChatTemplateTests: XCTestCase {
    func testTextIsJinjas() throws {
        let file = try Files.json("templates.json")
        let cases = file["cases"]?.array ?? []
        XCTAssertEqual(cases.count, 18)
        for entry in cases {
            let name = entry["template"]?.string ?? ""
            let template = try ChatTemplate(
                file["templates"]?[name]?.string ?? "", tokens: ["bos_token": "<s>", "eos_token": "</s>"])
            let messages = (entry["messages"]?.array ?? []).map {
                ChatMessage(role: $0["role"]?.string ?? "", content: $0["content"]?.string ?? "")
            }
            let addsPrompt = entry["prompt"]?.bool ?? false
            if let text = entry["text"]?.string {
                XCTAssertEqual(try template(messages, addingGenerationPrompt: addsPrompt), text, name)
            } else {
                XCTAssertThrowsError(try template(messages, addingGenerationPrompt: addsPrompt), name)
            }
        }
    }

    func testRefusesWhatItDoesNotKnow() {
        for source in [
            "{% macro a() %}{% endmacro %}", "{{ messages | tojson }}", "{{ strftime_now('%Y') }}", "{% if a %}", "{{ a",
            "{{ 'a }}", "{{ }}", "{{ a b }}", "{% for a of b %}{% endfor %}", "{{ a.b(1) }}", "{{ 99999999999999999999 }}",
            "{% endif %}", "{{ \(String(repeating: "(", count: 1000)) }}",
            String(repeating: "{% if a %}", count: 1000),
        ] {
            XCTAssertThrowsError(try ChatTemplate(source)([]), source) { error in
                guard case TTTError.unsupported = error else { return XCTFail("\(source): \(error)") }
            }
        }
    }
}
