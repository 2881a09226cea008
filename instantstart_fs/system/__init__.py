"""What Linux tells of itself and does when asked: knows no pipeline, no store and no mount of ours."""
